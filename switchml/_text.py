"""Text of strangers, made fit to be shown."""


def shown(text: object, most: int = 300) -> str:
    """A stranger's text with nothing in it that a terminal, a log or a metrics file would act on.

    Args:
        text: session, worker or host name, or a message.
        most: characters; what is longer is cut.

    Returns:
        Printable characters on one line; others as escapes.
    """
    words = str(text)
    cut = words[:most] + ("..." if len(words) > most else "")
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in cut)

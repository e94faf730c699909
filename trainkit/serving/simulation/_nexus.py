"""Nexus' placement: squishy bin packing of models onto GPUs (Shen et al., SOSP 2019, section 6.1)."""

from collections.abc import Mapping

from trainkit.serving.scheduler import Profile


def _saturating(profile: Profile, slo_ns: int) -> int:
    """Largest batch with 2 l(b) <= SLO, at least 1."""
    return max(1, sum(2 * latency <= slo_ns for latency in profile.latency_ns))


def plan(
    profiles: Mapping[str, Profile], gpus: int, rates: Mapping[str, float], slo_ns: Mapping[str, int]
) -> list[tuple[int, int, int, float]]:
    """(GPU, model, batch, share of the model's rate): whole GPUs first, the rests packed by duty cycle.

    Where the plan needs more GPUs than there are, the fullest GPUs' sessions are placed first and the rest joins the
    GPU with the least load; where it needs fewer, the models with the most load a GPU get the spare ones.
    """
    whole: list[tuple[int, int]] = []
    saturating = [_saturating(profile, slo_ns[name]) for name, profile in profiles.items()]
    rests: list[tuple[float, int, int, float]] = []  # duty cycle ns, model, batch, rate
    for number, (name, profile) in enumerate(profiles.items()):
        batch = saturating[number]
        capacity = batch / profile.latency_ns[batch - 1] * 1e9
        full, rest = divmod(rates.get(name, 0.0), capacity)
        whole += [(number, batch)] * int(full)
        if rest > 0 or not full:
            fits = [
                size
                for size, latency in enumerate(profile.latency_ns, 1)
                if latency + size / max(rest, 1e-9) * 1e9 <= slo_ns[name]
            ]
            size = max(fits, default=1)
            rests.append((size / max(rest, 1e-9) * 1e9, number, size, rest))
    tables = [profile.latency_ns for profile in profiles.values()]

    nodes: list[tuple[float, list[tuple[int, int, float]]]] = []  # duty cycle, sessions (model, batch, rate)
    for cycle, model, size, rate in sorted(rests, key=lambda r: -tables[r[1]][r[2] - 1] / r[0]):
        best = None
        for at, (other, sessions) in enumerate(nodes):
            duty = min(cycle, other)
            merged = [(m, max(1, round(r * duty / 1e9)), r) for m, _, r in [*sessions, (model, size, rate)]]
            if any(b > len(tables[m]) for m, b, _ in merged):
                continue
            used = sum(tables[m][b - 1] for m, b, _ in merged)
            if used <= duty and (best is None or used / duty > best[0]):
                best = used / duty, at, duty, merged
        if best:
            nodes[best[1]] = best[2], best[3]
        else:
            nodes.append((cycle, [(model, size, rate)]))

    filled = [[(model, batch, batch / tables[model][batch - 1] * 1e9)] for model, batch in whole]
    filled += [sessions for _, sessions in nodes]
    placed: list[list[tuple[int, int, float]]] = [[] for _ in range(gpus)]
    for at, sessions in enumerate(filled):
        target = at if at < gpus else min(range(gpus), key=lambda g: len(placed[g]))
        placed[target] += sessions
    for spare in range(len(filled), gpus):
        fullest = max(range(len(filled)), key=lambda g: sum(r * tables[m][b - 1] / b for m, b, r in placed[g]))
        # the spare GPU takes half of what the busiest planned one has
        placed[spare] = [(m, b, r / 2) for m, b, r in placed[fullest]]
        placed[fullest] = list(placed[spare])
    # GPUs that one model has alone share what they have of it equally: none runs at its limit beside one with room
    alone = [sessions[0][0] if len(sessions) == 1 else None for sessions in placed]
    for model in {model for model in alone if model is not None}:
        mine = [gpu for gpu, only in enumerate(alone) if only == model]
        each = sum(placed[gpu][0][2] for gpu in mine) / len(mine)
        for gpu in mine:
            placed[gpu] = [(model, saturating[model], each)]
    return [(gpu, model, batch, rate) for gpu, sessions in enumerate(placed) for model, batch, rate in sessions]

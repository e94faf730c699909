"""How many GPUs does an image classifier need, and what does the scheduler win? `python examples/serve_resnet.py`.

The profile is a linear one of a ResNet50, l(b) = 1.053 b + 5.072 ms; `trainkit serve profile` measures yours.
"""

from trainkit.serving import Profile, bounds, goodput, gpus_needed, simulate


def main() -> None:
    """Print the answers for an objective of 25 ms."""
    profiles = {"resnet": Profile.linear(1.053, 5.072, 32)}
    print(f"5000 requests/s need {gpus_needed(profiles, {'resnet': 5000}, slo_ms=25)} GPUs")
    print(f"no scheduler gets more than {bounds.fluid(profiles['resnet'], 8, 25):.0f} requests/s from 8 GPUs")
    for policy in ("symphony", "eager", "per_replica:8:4"):
        print(f"  {policy:16} {goodput(profiles, 8, slo_ms=25, policy=policy):.0f}")
    quiet = simulate(profiles, 8, {"resnet": 1750}, slo_ms=25)
    print(f"at 30 % load {quiet.gpus_touched} of 8 GPUs are used, {quiet.busy_gpus:.1f} busy on average")


if __name__ == "__main__":
    main()

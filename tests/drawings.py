"""How many examples hypothesis draws: all, or a quarter of them in `make test`."""

from hypothesis import HealthCheck, settings

# No example fails because the machine is busy.
settings.register_profile(
    "all", settings.default, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("all")
# The profile that `make test` chooses with --hypothesis-profile. Of the profiles, only it draws so few.
FEW = 25
settings.register_profile("quick", settings.get_profile("all"), max_examples=FEW)


def drawings(num_examples: int) -> int:
    """`num_examples`; with the profile "quick", a quarter of them and at least five."""
    return max(num_examples // 4, 5) if settings().max_examples == FEW else num_examples

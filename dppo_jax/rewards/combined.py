"""Several rewards as one."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from dppo_jax.prompts.examples import Example
from dppo_jax.rewards.verdicts import Failure, Limits, Verdict, Verifier, call, declared

_TAKEN = ("mean", "std", "groups_with_spread")  # what the training loop logs under reward/ itself


@dataclass(frozen=True)
class weighted:  # noqa: N801  a recipe reads it as a verb
    """score = Σ weights[name] · parts[name]'s score; each part is logged as `reward/<name>`.

    A weight that is not given is 1. Extracted answer and reason are those of the first part, the
    main one; the others' follow in the reason. Where a part fails, so does the whole: half of a
    reward would teach the wrong thing. If any part is declared isolated, all run in the worker
    pool, under the sum of the parts' seconds. Raises ValueError for a weight without a part.
    """

    parts: Mapping[str, Verifier]
    weights: Mapping[str, float] = field(default_factory=dict)
    isolate: Limits | None = field(init=False)

    def __post_init__(self) -> None:
        if not self.parts:
            raise ValueError("weighted() needs at least one part: {'name': verifier}")
        if unknown := set(self.weights) - set(self.parts):
            raise ValueError(f"weights for {sorted(unknown)}, but the parts are {[*self.parts]}")
        for name in self.parts:
            if name in _TAKEN or name.startswith("verifier_") or not name.isidentifier():
                raise ValueError(f"a part cannot be named {name!r}: reward/{name} is taken or odd")
        limits = [declared(part, "isolate") for part in self.parts.values()]
        strict = [limit for limit in limits if limit is not None]
        together = Limits(
            sum(limit.seconds for limit in strict),
            sum(limit.waiting_seconds for limit in strict),
            max(limit.memory_mb for limit in strict),
            any(limit.processes for limit in strict),
        ) if strict else None  # fmt: skip
        object.__setattr__(self, "isolate", together)

    def warm_up(self) -> None:
        """Warms up every part that asks for it."""
        for part in self.parts.values():
            if (warm_up := declared(part, "warm_up")) is not None:
                warm_up()

    def __call__(
        self, example: Example, response: str, finished: bool, *, tokens: int | None = None
    ) -> Verdict:
        """The weighted verdict."""
        verdicts = {
            name: call(part, example, response, finished, tokens)
            for name, part in self.parts.items()
        }
        score = sum(self.weights.get(name, 1.0) * v.score for name, v in verdicts.items())
        first, *others = verdicts
        reason = "; ".join(
            [verdicts[first].reason, *(f"{name}: {verdicts[name].reason}" for name in others)]
        )
        failures = [v.failure for v in verdicts.values() if v.failure]
        failure: Failure = failures[0] if failures else ""
        scores = {name: verdict.score for name, verdict in verdicts.items()}
        return Verdict(float(score), verdicts[first].extracted, reason, failure, scores)

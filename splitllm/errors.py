"""Every error a user or a peer can cause: one root, and each child is also a standard exception."""

from __future__ import annotations


class SplitLLMError(Exception):
    """The root. `str(error)` holds one complaint a line, each naming the thing, its value and the remedy."""


class RecipeError(SplitLLMError, ValueError):
    """The recipe or the command line is wrong (exit status 2).

    Args:
        problems: every complaint found, one line each.
    """

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class DataError(SplitLLMError, ValueError):
    """A data file is missing, malformed (file and line are named) or too small for the recipe."""


class FamilyError(SplitLLMError, ValueError):
    """This model family cannot be cut exactly; the message says why."""


class CheckpointError(SplitLLMError, ValueError):
    """A model checkpoint, adapter or training checkpoint has missing, misshapen or foreign content."""


class AverageError(SplitLLMError, ValueError):
    """Adapters cannot be averaged by this rule; the message says which could."""


class PrivacyError(SplitLLMError, ValueError):
    """What is asked for would not hide what it should: a sum could wrap, a group is too small, a library is missing."""


class VoidRoundError(SplitLLMError, RuntimeError):
    """Too few took part in a round: it has no outcome, nothing was changed, and it can be repeated."""


class CertificateError(SplitLLMError, ValueError):
    """A certificate or its key is missing, malformed, out of date, of another name or of another authority."""


class PeerError(SplitLLMError, ValueError):
    """A message from another role breaks the protocol."""


class RejoinError(PeerError):
    """The run went back to an earlier step, because a role was lost or came back: join again, and go on from there."""


class RankError(SplitLLMError, RuntimeError):
    """A process of a server that takes several is gone, or lost the step of the others: all of them stop."""


class DivergedError(SplitLLMError, ArithmeticError):
    """Loss or gradients are no longer finite; nothing was stepped with them."""


class RunInterrupted(SplitLLMError, KeyboardInterrupt):
    """The user stopped the run; a checkpoint was left and the message says how to go on."""

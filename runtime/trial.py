"""A canary that runs: which episodes of the log it wants, and what they tell it."""

from __future__ import annotations

from dataclasses import dataclass

from runtime.canary import Canary
from runtime.index import EpisodeRow
from runtime.policy import Policy


@dataclass(slots=True)
class Trial:
    """A candidate and the test of it.

    Episodes count that began since then. Of those that were in progress the short ones are missing, which are the
    successes: with them the live version would look worse than it is.
    """

    policy: Policy
    test: Canary
    since_unix_s: float

    def counts(self, row: EpisodeRow) -> bool:
        """Whether the test wants this episode."""
        known = row.versions in ((self.test.candidate,), (self.test.live,))
        return known and tells_of_one(row) and row.started_unix_s >= self.since_unix_s

    def add(self, row: EpisodeRow) -> None:
        """Take in an episode that counts. One that was stopped is a failure."""
        steps = self.test.horizon_steps if row.status == "aborted" else min(row.steps, self.test.horizon_steps)
        self.test.add(row.versions[0], row.status == "success", steps)


def tells_of_one(row: EpisodeRow) -> bool:
    """Whether an episode says something of one version: a policy drove it, one alone, to its end or to a stop, which is
    most often its doing. What else broke off says nothing of it.
    """
    broke_off = row.status == "aborted" and not row.reason.startswith("stopped")
    return row.source == "policy" and len(row.versions) == 1 and not broke_off

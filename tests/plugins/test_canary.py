"""Whether a new release is told from an old one by what is counted, and never by chance or for lack of samples."""

from __future__ import annotations

import random
from typing import Any

import pytest
from ansible.module_utils import canary

LIMITS = {"samples": 20, "error_percent": 1.0, "slow_percent": 10.0, "slow_ms": 100, "job_percent": 10.0}


def histogram(**counts: int) -> dict[str, float]:
    """Return a histogram from counts per bucket, such as ``within50=3``: three requests took 25 to 50 ms."""
    total, found = 0, {}
    for bound in (*canary.BOUNDS, "+Inf"):
        total += counts.get(f"within{bound}", 0)
        found[bound] = float(total)
    return found


QUICK = histogram(within25=90, within50=10)


def seen(requests: int = 100, errors: int = 0, **other: Any) -> dict[str, Any]:
    """Return what was counted of one release."""
    return {"requests": requests, "errors": errors, "histogram": QUICK, "jobs": [0, 50]} | other


OLD = seen(400)


def judge(new: dict[str, Any], old: dict[str, Any] = OLD, **limits: float) -> str:
    return str(canary.judge(new, old, LIMITS | limits)["verdict"])


def test_a_release_that_does_as_well_passes() -> None:
    assert judge(seen()) == "pass"


@pytest.mark.parametrize("count", [0, 5, 19])
def test_too_few_samples_are_never_success(count: int) -> None:
    found = canary.judge(seen(count), OLD, LIMITS)
    assert found["verdict"] == "inconclusive"
    assert found["reasons"] == [f"{count} of 20 requests needed to tell"]


@pytest.mark.parametrize(
    ("new", "said"),
    [
        (seen(20, errors=4), "4 of 20 (20.0 %) requests failed, of the old release 0 of 400"),
        (seen(5, errors=2), "2 of 5 (40.0 %) requests failed"),
        (seen(100, errors=100), "100 of 100"),
        (
            seen(histogram=histogram(within500=100)),
            "100 of 100 (100.0 %) requests were slow, of the old release 0 of 100",
        ),
        (seen(histogram=histogram(within25=80, within1000=20)), "20 of 100 (20.0 %) requests were slow"),
        (seen(20, histogram=histogram(within500=20)), "20 of 20 (100.0 %) requests were slow"),
        (seen(jobs=[9, 10]), "9 of 10 (90.0 %) jobs failed, of the old release 0 of 50"),
    ],
)
def test_a_release_that_does_worse_fails(new: dict[str, Any], said: str) -> None:
    found = canary.judge(new, OLD, LIMITS)
    assert found["verdict"] == "fail"
    assert any(reason.startswith(said) for reason in found["reasons"]), found["reasons"]


def test_one_failure_alone_does_not_convict_before_there_are_enough_samples() -> None:
    assert judge(seen(10, errors=1)) == "inconclusive"


def test_what_the_old_release_does_as_badly_is_no_fault_of_the_new_one() -> None:
    bad: dict[str, Any] = {"errors": 40, "histogram": histogram(within25=50, within1000=50), "jobs": [30, 60]}
    assert judge(seen(100, **{**bad, "errors": 11}), seen(400, **bad)) != "fail"


def test_a_difference_that_may_be_chance_is_inconclusive() -> None:
    """2 of 20 where the old release fails 2 of 100: more than 1 % more, and yet it happens to equal releases."""
    assert judge(seen(20, errors=2), seen(100, errors=3)) == "inconclusive"


def test_pages_that_cannot_be_fetched_convict_nobody_without_a_comparison() -> None:
    assert judge(seen(jobs=[2, 5]), seen(400, jobs=[0, 0])) == "pass"
    assert judge(seen(jobs=[20, 20]), seen(400, jobs=[0, 0])) == "fail"


def test_without_an_old_release_failures_still_count() -> None:
    assert judge(seen(50, errors=25), seen(0)) == "fail"


@pytest.mark.parametrize(
    ("new", "old", "what", "least", "most"),
    [
        (0.05, 0.05, "slow", 0, 2),
        (0.02, 0.02, "errors", 0, 2),
        (0.005, 0.005, "errors", 0, 2),
        (0.1, 0.0, "errors", 99, 100),
        (0.3, 0.05, "slow", 99, 100),
    ],
)
def test_looking_often_convicts_the_guilty_and_seldom_the_innocent(
    new: float, old: float, what: str, least: int, most: int
) -> None:
    """200 canaries at 5 % of traffic, each looked at after every second request of 300: percent that fail."""
    chance = random.Random(7)  # noqa: S311 - repeatable

    def events(count: int, rate: float) -> int:
        return sum(chance.random() < rate for _ in range(count))

    def side(bad: int, count: int) -> dict[str, Any]:
        if what == "errors":
            return seen(count, bad, histogram={})
        return seen(count, histogram=histogram(within25=count - bad, within2500=bad))

    def fails() -> bool:
        totals = [0, 0, 0, 0]
        for _ in range(150):
            for index, (count, rate) in enumerate(((2, new), (38, old))):
                totals[2 * index] += events(count, rate)
                totals[2 * index + 1] += count
            if judge(side(*totals[:2]), side(*totals[2:])) == "fail":
                return True
        return False

    assert least <= sum(fails() for _ in range(200)) / 2 <= most


# HAProxy's counters

STAT = "# pxname,svname,econ,eresp,type,hrsp_1xx,hrsp_2xx,hrsp_3xx,hrsp_4xx,hrsp_5xx,hrsp_other\nbe_blue,BACKEND,0,0,1,0,9,0,0,0,0"
TIMES = "# table: st_times, type: string, size:1024, used:1"


def counted(stat: list[str], times: list[str] | None = None) -> canary.Counters:
    return canary.counters("\n".join([STAT, *stat]), "\n".join([TIMES, *(times or [])]))


def test_errors_are_bad_answers_broken_answers_and_failed_connections() -> None:
    times = ["0x5581: key=be_blue/app1 use=0 exp=0 gpc0=17 gpc1=3 gpc2=9 gpc3=16"]
    found = counted(["be_blue,app1,1,2,2,0,10,0,3,4,0"], times)["be_blue/app1"]
    assert (found["requests"], found["errors"]) == (20, 7)
    assert (found["histogram"]["+Inf"], found["histogram"]["10"], found["histogram"]["50"]) == (17, 3, 16)


def test_counters_are_read_from_one_moment_to_the_other_also_across_a_reload() -> None:
    row = "0x1: key=be_blue/{} use=0 exp=0 gpc0={} gpc1={}"
    before = counted(
        ["be_blue,app1,0,0,2,0,10,0,0,0,0", "be_blue,app2,0,0,2,0,10,0,0,0,0"],
        [row.format("app1", 10, 4), row.format("app2", 10, 4)],
    )
    after = counted(
        ["be_blue,app1,0,0,2,0,13,0,0,1,0", "be_blue,app2,0,0,2,0,2,0,0,1,0"],
        [row.format("app1", 14, 7), row.format("app2", 3, 3)],
    )
    found = canary.since(before, after, ["be_blue/app1", "be_blue/app2", "be_blue/gone"])
    assert (found["requests"], found["errors"]) == (4 + 3, 1 + 1)
    assert (found["histogram"]["+Inf"], found["histogram"]["10"]) == (4 + 3, 3 + 3)


def test_a_reload_shows_also_where_more_was_counted_since_than_before() -> None:
    """Five failures of ten before; none of twelve since: what is left of the old release is not less than no failure."""
    row = "0x1: key=be_blue/app1 use=0 exp=0 gpc0={} gpc1={}"
    before = counted(["be_blue,app1,0,0,2,0,5,0,0,5,0"], [row.format(10, 4)])
    after = counted(["be_blue,app1,0,0,2,0,12,0,0,0,0"], [row.format(12, 12)])
    found = canary.since(before, after, ["be_blue/app1"])
    assert (found["requests"], found["errors"], found["histogram"]["10"]) == (12, 0, 12)
    assert judge(seen(100), seen(**found)) == "pass"


# The services' metrics

METRICS = """# TYPE atlas_queue_deployment_events gauge
atlas_queue_deployment_events{deployment="7",event="finished"} 6.0
atlas_queue_deployment_events{deployment="7",event="died"} 2.0
atlas_queue_deployment_events{deployment="7",event="requeued"} 9.0
atlas_queue_deployment_events{deployment="6",event="finished"} 4.0
"""


def test_jobs_are_counted_by_deployment() -> None:
    assert canary.jobs(METRICS) == {"7": [2.0, 8.0], "6": [0.0, 4.0]}


def test_slow_is_measured_by_what_the_old_release_does() -> None:
    assert canary.slow_limit(histogram(within25=100), 100) == "250"
    assert canary.slow_limit(histogram(within25=100), 20) == "50"
    assert canary.slow_limit(histogram(within500=100), 100) == "1000"
    assert canary.slow_limit(histogram(within25=5), 100) is None
    assert canary.slow_limit({}, 100) is None


# All hosts together


def edge(new: tuple[int, int], old: tuple[int, int]) -> dict[str, Any]:
    sides = zip(("new", "old"), (new, old), strict=True)
    return {"edge": {side: {"requests": n, "errors": bad, "histogram": QUICK} for side, (n, bad) in sides}}


def app(jobs: dict[str, list[int]] | None = None) -> dict[str, Any]:
    return {"jobs": jobs or {}}


def verdict(watched: dict[str, Any], before: dict[str, Any] | None = None) -> dict[str, Any]:
    return canary.verdict(watched, before or {}, (7, 6), LIMITS)


def test_what_edges_counted_is_added() -> None:
    watched = {"edge1": edge((15, 0), (100, 0)), "edge2": edge((8, 0), (100, 0)), "app1": app()}
    found = verdict(watched)
    assert found["verdict"] == "pass" and found["figures"]["requests"] == [23, 200]


def test_one_edge_may_see_too_little_but_not_all_of_them() -> None:
    watched = {"edge1": edge((5, 0), (100, 0)), "edge2": edge((0, 0), (0, 0)), "app1": app()}
    assert verdict(watched)["verdict"] == "inconclusive"


def test_an_edge_that_took_its_traffic_back_ends_the_deploy_whatever_the_others_saw() -> None:
    one = edge((20, 4), (400, 0))
    one["edge"]["withdrawn"] = True
    watched = {"edge1": one, "edge2": edge((500, 0), (9000, 0)), "app1": app()}
    found = verdict(watched)
    assert found["verdict"] == "fail"
    assert found["reasons"] == ["edge1 took its traffic back, because there it certainly did worse"]
    one["edge"]["withdrawn"] = False
    assert verdict(watched)["verdict"] == "pass"


def test_jobs_are_those_of_the_two_deployments() -> None:
    watched = {"edge1": edge((50, 0), (100, 0)), "app1": app({"7": [10, 10], "6": [0, 50], "5": [50, 50]})}
    found = verdict(watched)
    assert found["verdict"] == "fail" and found["figures"]["jobs"] == [[10, 10], [0, 50]]


def test_where_the_old_release_serves_no_more_it_counts_as_it_did_before() -> None:
    watched = {"edge1": edge((50, 2), (0, 0)), "app1": app()}
    before = {"edge1": {"requests": 100, "errors": 20, "histogram": QUICK}}
    found = verdict(watched, before)
    assert found["figures"]["errors"] == [2, 20] and found["verdict"] == "pass"


def test_a_host_that_failed_or_is_gone_is_no_success() -> None:
    watched = {"edge1": edge((50, 0), (100, 0)), "app1": {"failed": True}, "app2": {"unreachable": True}}
    found = verdict(watched)
    assert (found["verdict"], found["reasons"]) == ("fail", ["app2 cannot be reached any more"])


def test_the_figures_can_be_read() -> None:
    found = verdict({"edge1": edge((50, 1), (100, 0)), "app1": app({"7": [1, 4], "6": [0, 9]})})
    assert canary.told(found) == (
        "requests 50 (old 100), failed 1 (old 0), over 250 ms 0 % (old 0 %), jobs failed 1 of 4 (old 0 of 9)"
    )


def test_counters_that_were_read_while_they_moved_convict_nobody() -> None:
    """A bucket may be one ahead of the total."""
    share = canary.Share(-1, 5)
    assert share.bound(-1) == pytest.approx(0) and 0 < share.bound(1) < 1
    moving = {"requests": 5, "errors": 0, "jobs": [0, 0], "histogram": {"100": 6.0, "+Inf": 5.0}}
    limits = {"samples": 0, "error_percent": 1, "slow_percent": 10, "job_percent": 10, "slow_ms": 50}
    steady = {**moving, "requests": 50, "histogram": {"10": 40.0, "100": 50.0, "+Inf": 50.0}}
    for new, old in ((moving, steady), (steady, moving), (steady, {**moving, "jobs": [-1, 5]})):
        assert canary.judge(new, old, limits)["verdict"] == "pass"

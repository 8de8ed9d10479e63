"""What a run's records tell: which link this is, which jobs follow it, and for how long there was no progress. Pure."""

from typing import Any, Dict, Iterable, List, NamedTuple, Optional, Set

Record = Dict[str, Any]
RUN_MODES = ("scratch", "finetune", "resume")
# A link that is put back into the queue again and again without progress counts as more than one: a node that kills
# jobs once had one requeued 35 times (arXiv 2410.21680). Preemptions in between deserve some patience.
REQUEUES_PER_LINK = 3


def link_number(given: Optional[int], job_id: str, links: List[Record], ledger: List[Record]) -> int:
    """This link's number: as given, else the one this job id already has (a requeue keeps it), else the next free one."""
    if given is not None:
        return given
    for record in reversed(ledger + links):
        if job_id and str(record.get("job_id")) == job_id and isinstance(record.get("link"), int):
            return int(record["link"])
    return last_link(links, ledger) + 1


def last_link(links: List[Record], ledger: List[Record]) -> int:
    """The greatest link number on record, 0 when there is none."""
    return max([0] + [int(record["link"]) for record in ledger + links if isinstance(record.get("link"), int)])


def attempts(links: Iterable[Record]) -> List[Record]:
    """The starts of the step, oldest first: one per link, and one more for each time a link was put back in the queue."""
    return [record for record in links if record.get("event") == "begin" and record.get("mode") in RUN_MODES]


def successors(link: int, job_id: str, ledger: List[Record]) -> List[Record]:
    """The submitted and not yet cancelled jobs of later links, side jobs included, the latest link first.

    Latest first, so that none of them sees its predecessor end and starts while the others are being cancelled.
    """
    cancelled = {str(record.get("job_id")) for record in ledger if record.get("event") == "cancelled"}
    found = {}
    for record in ledger:
        wanted = record.get("event") == "submitted" and isinstance(record.get("link"), int) and record["link"] > link
        other = str(record.get("job_id"))
        if wanted and other not in cancelled and other != job_id and other.isdigit():
            found[other] = record
    return sorted(found.values(), key=lambda record: (-record["link"], -int(record["job_id"])))


class Standstill(NamedTuple):
    """How long a run has stood still: links that ended, and times the step was started, from the same checkpoint."""

    links: int
    starts: int
    gave_up: bool  # the chain gave up and nobody submitted this link since


def standstill(links: List[Record], link: int, checkpoint: Optional[str]) -> Standstill:
    """Counts back over the starts that began from `checkpoint`, the one this start would begin from too.

    A link submitted after the chain gave up (its number is greater than any known then) counts from there anew: a
    person has looked at it.
    """
    ended: Set[Any] = set()
    put_back = _never_trained(links)
    starts = 0
    for record in reversed(links):
        if record.get("event") != "begin":
            continue
        if record.get("mode") == "gave_up":
            known = record.get("known_links")
            return Standstill(len(ended), starts, not (isinstance(known, int) and link > known))
        if record.get("mode") not in RUN_MODES:
            continue
        if record.get("checkpoint") != checkpoint:
            break
        if (str(record.get("job_id")), record.get("restart")) in put_back:
            continue
        starts += 1
        if record.get("link") != link:
            ended.add(record.get("link"))
    return Standstill(len(ended), starts, False)


def gives_up(still: Standstill, give_up_after: int) -> bool:
    return still.gave_up or still.links >= give_up_after or still.starts >= REQUEUES_PER_LINK * give_up_after


def open_attempt(links: List[Record], job_id: str, restart: int) -> Optional[Record]:
    """The start that this job recorded and has not ended yet, None when there is none."""
    for record in reversed(links):
        if str(record.get("job_id")) == job_id and record.get("restart") == restart:
            if record.get("event") == "preflight" and record.get("action") != "requeue":
                continue
            return record if record.get("event") == "begin" and record.get("mode") in RUN_MODES else None
    return None


def preflight_requeues(links: Iterable[Record], job_id: str) -> int:
    """How often this job put itself back into the queue because of its nodes."""
    return sum(
        record.get("event") == "preflight" and record.get("action") == "requeue" and str(record.get("job_id")) == job_id
        for record in links
    )


def _never_trained(links: Iterable[Record]) -> Set[Any]:
    """The (job, restart) of starts that their preflight put back before anything trained: they say nothing about progress."""
    return {
        (str(record.get("job_id")), record.get("restart"))
        for record in links
        if record.get("event") == "preflight" and record.get("action") == "requeue"
    }


def made_by(links: List[Record], link: int, newest: Optional[str]) -> Optional[str]:
    """The newest checkpoint that link `link` made, None when it made none.

    `newest` is the newest complete checkpoint now; it stands in where the link was killed before it could record its end.
    """
    own = [index for index, record in enumerate(links) if record.get("link") == link and record in attempts(links)]
    if not own:
        return None
    before = links[own[0]].get("checkpoint")
    after = newest
    for record in links[own[-1] + 1 :]:
        if record.get("link") == link and record.get("event") == "end":
            after = record.get("checkpoint")
            break
        if record.get("link") != link and record.get("event") == "begin" and "checkpoint" in record:
            after = record.get("checkpoint")
            break
    return after if isinstance(after, str) and after != before else None

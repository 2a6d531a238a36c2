"""Collect what the work directory of a run contains: its sessions, records, warnings, configuration and checkpoints."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, final

from stratagem.checkpoint import list_checkpoints
from stratagem.config import changed_values
from stratagem.errors import CheckpointDamagedError, CheckpointNotFoundError, StratagemError
from stratagem.report.log_records import Records, Warnings, read_log, read_records
from stratagem.train.goodput.account import Goodput, SessionTimes, account, lineage_of, read_sessions
from stratagem.train.goodput.recorder import TIMES
from stratagem.train.run.run_history import RECORD, Outcome, Session, read_record
from stratagem.utils import mask_text

__all__ = [
    "KEYS_OF_RESUMING",
    "Checkpoint",
    "RunFacts",
    "SessionFacts",
    "collect",
    "config_changes",
    "find_runs",
    "is_running",
]

_SCALARS: Final = "vis_data/scalars.json"
_LOCK: Final = ".training.json"
# A run whose lock was updated this recently is running.
_RUNNING_S: Final = 60.0
_CONFIGS: Final = (".py", ".yaml")
_LONGEST_CONFIG: Final = 500_000
#: The keys of a configuration that do not describe the training.
KEYS_OF_RESUMING: Final = (
    "resume",
    "load_from",
    "resume_optimizer",
    "resume_param_scheduler",
    "new_parameters",
    "work_dir",
)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class SessionFacts:
    """A session: its record, outcome and times, as far as they exist.

    Attributes:
        folder: its folder.
        session: its entry in the history of the run.
        outcome: how it ended.
        times: its recorded times; several, if a program has trained several times in this session folder.
        running: whether it is still running.
        last_logged: the last iteration in its records.
    """

    folder: Path
    session: Session | None
    outcome: Outcome | None
    times: Sequence[SessionTimes]
    running: bool = False
    last_logged: int = 0

    @property
    def first_iter(self) -> int:
        """The completed iterations at its start."""
        if self.session is not None:
            return self.session.iter
        return self.times[0].first_iter if self.times else 0

    @property
    def last_iter(self) -> int:
        """The completed iterations at its end, as far as they are recorded."""
        if self.outcome is not None:
            return self.outcome.iter
        recorded = (moment.iter for times in self.times for moment in times.moments)
        return max(self.first_iter, self.last_logged, *recorded)

    @property
    def how(self) -> str:
        """How it ended, as a few words."""
        if self.outcome is not None:
            return mask_text(self.outcome.how)
        if self.running:
            return "running"
        if self.times and self.times[-1].outcome is not None:
            return self.times[-1].outcome
        return "killed"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A checkpoint in the work directory."""

    name: str
    saved_at: float
    iter: int
    metric: str
    score: float
    fault: str


@final
@dataclass(slots=True, kw_only=True)
class RunFacts:
    """Everything that the report shows about a run.

    Attributes:
        name: the name of the work directory.
        work_dir: the work directory.
        sessions: the sessions of the run, oldest first.
        others: the number of sessions of other runs in the work directory.
        records: the logged values.
        warnings: the warnings and errors in the logs.
        goodput: where the wall time went; None if it is unknown.
        config: the configuration; empty if it was not saved.
        environment: the environment of the last session.
        checkpoints: the checkpoints of the run in the work directory.
    """

    name: str
    work_dir: Path
    sessions: list[SessionFacts]
    others: int = 0
    records: Records = field(default_factory=Records)
    warnings: Warnings = field(default_factory=Warnings)
    goodput: Goodput | None = None
    config: str = ""
    environment: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    checkpoints: Sequence[Checkpoint] = ()


def collect(path: Path) -> RunFacts:
    """Collect the facts about a run.

    Args:
        path: the work directory, for the newest run in it, or the folder of a session, for its run up to this session.

    Raises:
        CheckpointNotFoundError: if the folder does not contain a run.
    """
    path = path.absolute()
    given = is_session(path)
    work_dir = path.parent if given else path
    folders = session_folders(work_dir)
    if given and path not in folders:
        folders = [path]
    if not folders:
        raise CheckpointNotFoundError(
            f"{path} does not contain a run: it has no folder with {RECORD}, {TIMES} or {_SCALARS}. Pass the work directory of "
            "a run, or the folder of one of its sessions."
        )
    sessions = _sessions(work_dir, folders, path if given else None)
    facts = RunFacts(name=work_dir.name, work_dir=work_dir, sessions=[], others=len(folders) - len(sessions))
    for session, before in zip(sessions, _last_iterations(sessions), strict=True):
        last = read_records(session.folder / _SCALARS, facts.records, before=before)
        facts.sessions.append(replace(session, last_logged=last))
        for log in sorted(session.folder.glob("*.log")):
            if "_rank" not in log.stem:
                read_log(log, facts.warnings)
    known = [times for session in sessions for times in session.times]
    facts.goodput = account(known) if known else None
    facts.config = _config(work_dir, sessions[-1].folder)
    facts.environment = _environment(sessions)
    facts.checkpoints = _checkpoints(work_dir, sessions)
    return facts


def session_folders(work_dir: Path) -> list[Path]:
    """Return the folders of the sessions in a work directory, oldest first.

    The folders of tests and predictions have neither a record nor times. Before the first session with a record, such folders
    may also be trainings of earlier versions, whose values include those of the training.
    """
    found = sorted(filter(is_session, _subfolders(work_dir)))
    trained = [any((folder / name).is_file() for name in (RECORD, TIMES)) for folder in found]
    first = trained.index(True) if True in trained else len(found)
    return [
        folder
        for index, folder in enumerate(found)
        if trained[index] or (index < first and not _only_evaluated(folder))
    ]


def _only_evaluated(folder: Path) -> bool:
    """Return whether a folder has logged values, and all of them are those of validations and tests."""
    try:
        with (folder / _SCALARS).open(encoding="utf-8") as lines:
            modes = {json.loads(line).get("mode", "train") for line in lines}
    except (OSError, ValueError, AttributeError):
        return False
    return bool(modes) and modes <= {"val", "test"}


def find_runs(folder: Path) -> list[Path]:
    """Return the work directories in a folder, or the folder if it is one, from the one that was started first."""
    candidates = [folder, *_subfolders(folder), *(inner for each in _subfolders(folder) for inner in _subfolders(each))]
    found = {each: sessions for each in candidates if (sessions := session_folders(each))}
    return sorted(found, key=lambda each: found[each][0].name)


def config_changes(first: RunFacts, other: RunFacts) -> list[str]:
    """Return the differences between the configurations of two runs, one line each."""
    try:
        return changed_values(first.config, other.config, ignored=KEYS_OF_RESUMING)
    except StratagemError:
        return []


def is_session(folder: Path) -> bool:
    """Return whether a folder has the files of a session."""
    return any((folder / name).is_file() for name in (RECORD, TIMES, _SCALARS))


def _subfolders(folder: Path) -> Iterable[Path]:
    try:
        return [each for each in folder.iterdir() if each.is_dir()]
    except OSError:
        return []


def _sessions(work_dir: Path, folders: Sequence[Path], last: Path | None) -> list[SessionFacts]:
    """Return the sessions of the run of the last session."""
    records = {folder: _read_record(folder) for folder in folders}
    last = last or folders[-1]
    times: dict[Path, list[SessionTimes]] = {}
    for each in lineage_of(read_sessions(work_dir), last):
        times.setdefault(each.folder, []).append(each)
    named = {work_dir / Path(session.name).name for session in records[last][0]}
    found = [folder for folder in folders if folder in times or folder in named or folder == last]
    running = last == folders[-1] and is_running(work_dir)
    return [
        SessionFacts(
            folder=folder,
            session=records[folder][0][-1] if records[folder][0] else None,
            outcome=records[folder][1],
            times=times.get(folder, ()),
            running=running and folder == last and records[folder][1] is None,
        )
        for folder in found
    ]


def _read_record(folder: Path) -> tuple[Sequence[Session], Outcome | None]:
    try:
        history, outcome = read_record(folder)
    except CheckpointDamagedError:
        return (), None
    return history.sessions, outcome


def is_running(work_dir: Path) -> bool:
    """Return whether a run has updated the lock of its work directory in the last minute."""
    try:
        return time.time() - (work_dir / _LOCK).stat().st_mtime < _RUNNING_S
    except OSError:
        return False


def _last_iterations(sessions: Sequence[SessionFacts]) -> list[float]:
    """Return the last iteration of each session that a later session has not trained again."""
    lasts: list[float] = []
    before = float("inf")
    for session in reversed(sessions):
        lasts.append(before)
        if session.session is not None or any(times.run_id is not None for times in session.times):
            before = min(before, session.first_iter)
    return lasts[::-1]


def _config(work_dir: Path, session: Path) -> str:
    """Return the text of the saved configuration: the one of this session, otherwise the newest."""
    candidates = [session.parent / f"{session.name}{suffix}" for suffix in _CONFIGS]
    with suppress(OSError):
        others = [file for file in work_dir.iterdir() if file.suffix in _CONFIGS and file.is_file()]
        candidates += sorted(others, key=lambda file: file.stat().st_mtime, reverse=True)
    for file in candidates:
        try:
            with file.open(encoding="utf-8", errors="replace") as text:
                return mask_text(text.read(_LONGEST_CONFIG))
        except OSError:
            continue
    return ""


def _environment(sessions: Sequence[SessionFacts]) -> Mapping[str, Mapping[str, str]]:
    for session in reversed(sessions):
        try:
            report = json.loads((session.folder / "environment.json").read_text(encoding="utf-8"))
            return {
                str(part): {str(key): mask_text(str(value)) for key, value in values.items()}
                for part, values in report.items()
            }
        except (OSError, ValueError, AttributeError):
            continue
    return {}


def _checkpoints(work_dir: Path, sessions: Sequence[SessionFacts]) -> list[Checkpoint]:
    run_ids = {times.run_id for session in sessions for times in session.times}
    try:
        found = list_checkpoints(work_dir)
    except (OSError, StratagemError):
        return []
    return [
        Checkpoint(
            name=each.path.name,
            saved_at=each.saved_at,
            iter=each.position.get("iter", 0),
            metric=each.retention_tag.metric,
            score=each.retention_tag.score,
            fault=each.fault,
        )
        for each in found
        if each.run_id in run_ids or not run_ids
    ]

"""No secret is saved or printed by a run, a crash, a resume, and commands that inspect the run."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus

import pytest

from stratagem.utils.secrets import values as secret_values

Command = Callable[..., Any]

TOY = Path(__file__).with_name("toy_config.py").as_posix()
LOCATIONS = (
    "password", "api_key", "list", "credentials", "camel", "user_info", "signature", "credential", "query", "user_info_in_list",
    "placeholder", "part", "data", "computed", "environment", "assigned", "url_in_error", "header", "override", "override_url",
)  # fmt: skip
# The secrets have no common parts, and some contain characters that URLs, JSON and Python escape.
SPECIAL = {"password", "placeholder"}
SECRETS = {
    location: f"{number:02}x{(7919 * (number + 3) ** 5) % 2**32:08x}"
    + ("é/+'\"%"[number % 7 :][:2] if location in SPECIAL else "zq")
    for number, location in enumerate(LOCATIONS)
}
IN_ENVIRONMENT = {
    "MY_SETTING": "placeholder", "PART_OF_IT": "part", "FROM_DATA": "data", "HF_TOKEN": "computed", "WANDB_API_KEY": "environment"
}  # fmt: skip
BASE = """
vars:
  from_data: "{{ $FROM_DATA }}"
  dotted: {{ $FROM_DATA }}
"""
CONFIG = f"""
import os

_base_ = ["{TOY}", "base.yaml"]
custom_imports = dict(imports=["toy_parts", "leaking_hook"])
vars = dict(
    password={SECRETS["password"]!r},
    nested=dict(api_key="{SECRETS["api_key"]}", note="the key is {SECRETS["api_key"]}"),
    api_keys=["{SECRETS["list"]}"],
    credentials=dict(user="somebody", value="{SECRETS["credentials"]}"),
    clientSecret="{SECRETS["camel"]}",
    url="https://somebody:{SECRETS["user_info"]}@host/x?sig={SECRETS["signature"]}&part=1",
    signed="https://host/x?X-Amz-Credential={SECRETS["credential"]}&X-Amz-Signature={SECRETS["signature"]}",
    mirrors=["see s3://{SECRETS["user_info_in_list"]}@bucket/x", "https://host/?access_token={SECRETS["query"]}"],
    whole="{{{{ $MY_SETTING }}}}",
    half="before-{{{{ $PART_OF_IT }}}}-after",
    computed="Bearer " + os.environ["HF_TOKEN"],
    tokenizer="bert-base-cased",
    custom_keys=dict(backbone="slow"),
)
custom_hooks = [dict(type="LeakingHook", login="{SECRETS["api_key"]}")]
default_hooks = dict(
    runtime_info=dict(_delete_=True, type="RuntimeInfoHook"),
    checkpoint=dict(type="CheckpointHook", interval=1, published_keys="state_dict"),
)
"""
HOOK = f"""
import json
import os
from stratagem.registry import HOOKS
from stratagem.train import Hook

@HOOKS.register_module()
class LeakingHook(Hook):
    def __init__(self, login):
        self.login = login

    def after_train_iter(self, run, *args, **kwargs):
        run.logger.info("values: %s", dict(run_vars()))
        run.record(dict(run_vars()))
        if run.iter >= 6 and "CRASH" in os.environ:
            try:
                raise ValueError(f"{{self.login}} {{os.environ['HF_TOKEN']}} {{os.environ['MY_SETTING']}}")
            except ValueError as error:
                raise RuntimeError(f"{{error}} password={SECRETS["assigned"]} https://me:{SECRETS["url_in_error"]}@host "
                                   "Authorization: Bearer {SECRETS["header"]} " + json.dumps(dict(run_vars()))) from error

def run_vars():
    return [(name, os.environ[name]) for name in {sorted(IN_ENVIRONMENT)!r}]
"""
OVERRIDES = (
    "--set", f"vars.token={SECRETS['override']}",
    "--set", f"vars.other=https://me:{SECRETS['override_url']}@host/",
    "--work-dir", "run",
)  # fmt: skip


@pytest.fixture
def secret_run(stratagem: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Run a command like a new process would, and return its output."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "run.py").write_text(CONFIG)
    (source / "base.yaml").write_text(BASE)
    (source / "leaking_hook.py").write_text(HOOK)
    for variable, location in IN_ENVIRONMENT.items():
        monkeypatch.setenv(variable, SECRETS[location])

    def run(*words: object, status: int = 0) -> str:
        for memory in (secret_values._secrets, secret_values._placeholders, secret_values._allowed):
            memory.clear()
        secret_values._cache.clear()
        outcome = stratagem(*words)
        assert outcome.status == status, outcome.err
        return str(outcome.out + outcome.err)

    return run


def forms(secret: str) -> set[bytes]:
    """Return the escaped forms of a secret."""
    written = {
        secret,
        quote(secret),
        quote(secret, safe=""),
        quote_plus(secret),
        json.dumps(secret)[1:-1],
        repr(secret)[1:-1],
    }
    return {form.encode() for form in written}


def found_in(data: bytes, location: str) -> Iterator[str]:
    """Yield one line for each secret in ``data``."""
    for name, secret in SECRETS.items():
        if any(form in data for form in forms(secret)):
            yield f"{name} in {location}"


def found_in_files(folder: Path) -> Iterator[str]:
    """Yield one line for each secret in a file or in a member of an archive."""
    for file in filter(Path.is_file, folder.rglob("*")):
        yield from found_in(file.read_bytes() + str(file.relative_to(folder)).encode(), str(file))
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                for name in archive.namelist():
                    yield from found_in(archive.read(name), f"{file}:{name}")


def printed_by_commands(run: Callable[..., str], session: str) -> Mapping[str, str]:
    """Return the output of each command that inspects the run."""
    source = ("source/run.py", *OVERRIDES[:4])
    commands: dict[str, tuple[object, ...]] = {
        **{f"config show {form}": ("config", "show", *source, "--as", form) for form in ("python", "yaml", "json")},
        **{
            f"config explain {key}": ("config", "explain", "source/run.py", f"vars.{key}", *OVERRIDES[:4])
            for key in (
                "password",
                "nested",
                "credentials",
                "url",
                "mirrors",
                "whole",
                "half",
                "token",
                "other",
                "from_data",
            )
        },
        "config check": ("config", "check", *source),
        "config diff": ("config", "diff", "run/run.py", "source/run.py"),
        "runs ls": ("runs", "ls", "run"),
        "runs show": ("runs", "show", session),
        "runs show of a checkpoint": ("runs", "show", "run/epoch_2"),
        "ckpt show": ("ckpt", "show", "run/epoch_2"),
        "ckpt show --config": ("ckpt", "show", "run/epoch_2", "--config"),
        "ckpt ls": ("ckpt", "ls", "run"),
        "train": ("train", *source, "--work-dir", "run", "--resume"),
    }
    return {name: run(*words) for name, words in commands.items()}


@pytest.mark.slow
def test_no_secret_is_saved_or_printed(
    secret_run: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None of 20 secrets from the configuration, environment, URLs and errors is in the files or output of a crashed run."""
    assert len(SECRETS) == 20
    monkeypatch.setenv("CRASH", "1")
    printed = {"crash": secret_run("train", "source/run.py", *OVERRIDES, status=1)}
    printed["crash with traceback"] = secret_run(
        "train", "source/run.py", *OVERRIDES, "--resume", "--traceback", status=1
    )
    monkeypatch.delenv("CRASH")
    single = ("--set", "default_hooks.checkpoint.filename_tmpl=epoch_{}.pth", "--work-dir", "single")
    printed["single files"] = secret_run("train", "source/run.py", *OVERRIDES[:4], *single)
    printed["resume"] = secret_run("train", "source/run.py", *OVERRIDES, "--resume")
    session = next(path.parent for path in (tmp_path / "run").glob("*/start.json"))
    printed |= printed_by_commands(secret_run, str(session))
    hits = [hit for command, text in printed.items() for hit in found_in(text.encode(), command)]
    hits += [hit for folder in ("run", "single") for hit in found_in_files(tmp_path / folder)]
    assert hits == []
    # Make sure that the outputs are not empty.
    assert "RuntimeError" in printed["crash with traceback"]
    assert "tokenizer='bert-base-cased'" in (tmp_path / "run" / "run.py").read_text()


@pytest.mark.slow
def test_a_resumed_run_reports_no_changed_secrets(secret_run: Callable[..., str], tmp_path: Path) -> None:
    """Masked secrets are not reported as changes when a run resumes."""
    secret_run("train", "source/run.py", *OVERRIDES, "--set", "train_cfg.max_epochs=1")
    secret_run("train", "source/run.py", *OVERRIDES, "--resume")
    sessions = [json.loads(file.read_text())["lineage"][-1] for file in (tmp_path / "run").glob("*/start.json")]
    changes = [change for session in sessions for change in session["changes"]]
    assert changes == ["train_cfg.max_epochs: 1 -> 2"]


@pytest.mark.slow
def test_a_saved_configuration_contains_placeholders(secret_run: Callable[..., str], tmp_path: Path) -> None:
    """The saved configuration contains placeholders and loads with the same values."""
    secret_run("train", "source/run.py", "--work-dir", "run")
    kept = (tmp_path / "run" / "run.py").read_text()
    for line in (
        "whole='{{ $MY_SETTING }}'", "half='before-{{ $PART_OF_IT }}-after'", "from_data='{{ $FROM_DATA }}'",
        "computed='Bearer {{ $HF_TOKEN }}'", "password='{{ $SECRET:vars.password }}'",
        "note='the key is {{ $SECRET:vars.nested.note }}'", "api_keys=['{{ $SECRET:vars.api_keys.0 }}']",
        "url='https://{{ $SECRET:vars.url }}@host/x?sig={{ $SECRET:vars.url }}&part=1'",
    ):  # fmt: skip
        assert line in kept
    differences = secret_run("config", "diff", "run/run.py", "source/run.py").splitlines()
    changed = [line for line in differences if line[:1] in "+-" and line[:3] not in ("+++", "---")]
    assert changed == ["-work_dir = 'run'"]


@pytest.mark.slow
def test_a_saved_configuration_can_resume_its_run(secret_run: Callable[..., str]) -> None:
    """A run can resume from the saved configuration if the secrets that it uses are set again."""
    secret_run("train", "source/run.py", "--work-dir", "run", "--set", "train_cfg.max_epochs=1")
    again = ("train", "run/run.py", "--work-dir", "run", "--resume", "--set", "train_cfg.max_epochs=2")
    rejected = secret_run(*again, status=2)
    assert "run/run.py:" in rejected
    assert "the secret custom_hooks.0.login was masked" in rejected
    assert "Trained 2 epochs" in secret_run(*again, "--set", "custom_hooks.0.login=anything")


@pytest.mark.slow
def test_a_configuration_in_the_run_folder_is_not_overwritten(secret_run: Callable[..., str], tmp_path: Path) -> None:
    """A configuration in the run folder is not overwritten by the masked copy."""
    secret_run("train", "source/run.py", "--work-dir", "source")
    assert (tmp_path / "source" / "run.py").read_text() == CONFIG
    kept = [file for file in (tmp_path / "source").glob("*.py") if "{{ $SECRET:vars.password }}" in file.read_text()]
    assert len(kept) == 1


def test_a_batch_script_with_a_secret_is_rejected(secret_run: Callable[..., str]) -> None:
    """`submit` rejects a secret on the command line, because the script would contain it."""
    rejected = secret_run("submit", "source/run.py", *OVERRIDES, "--nodes", "1", "--time", "1:00:00", status=2)
    assert "--set vars.token=...: the value is or contains a secret" in rejected
    assert not list(found_in(rejected.encode(), "error"))

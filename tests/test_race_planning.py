"""`heavyball plan`: the architectures and the tables."""

import math

import pytest
import torch
from click.testing import CliRunner
from torch import nn

import heavyball
from heavyball import memory_plan
from heavyball.race import cli as command
from heavyball.race.shapes import ARCHITECTURES, architecture

# As published, or as counted on the published implementation.
ELEMENTS = {
    "gpt2-124m": 124_439_808,
    "gpt2-1.5b": 1_557_611_200,
    "llama-7b": 6_738_415_616,
    "llama-70b": 68_976_648_192,
    "resnet-18": 11_689_512,
    "resnet-50": 25_557_032,
    "vit-b-16": 86_567_656,
}
TENSORS = {
    "gpt2-124m": 148,
    "gpt2-1.5b": 580,
    "llama-7b": 291,
    "llama-70b": 723,
    "resnet-18": 62,
    "resnet-50": 161,
    "vit-b-16": 152,
}


def heavyball_command(*words):
    return CliRunner().invoke(command.cli, ["plan", *words])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_architecture_has_the_parameters_that_it_is_known_for(name):
    params = architecture(name, torch.bfloat16)
    assert sum(p.numel() for _, p in params) == ELEMENTS[name]
    assert len(params) == TENSORS[name]
    assert len({place for place, _ in params}) == len(params)
    assert {(p.device.type, p.dtype) for _, p in params} == {("meta", torch.bfloat16)}


def test_transformer_blocks_have_the_shapes_of_torchs_own():
    with torch.device("meta"):
        layer = nn.TransformerEncoderLayer(768, 12, 3072)
    own = sorted(tuple(p.shape) for p in layer.parameters())
    found = [s for place, s in ARCHITECTURES["vit-b-16"]() if place.startswith("encoder.3.")]
    assert sorted(found) == own


def test_all_presets_are_planned_where_none_is_named():
    name = "resnet-18"
    result = heavyball_command("--model", name)
    assert result.exit_code == 0, result.output
    for preset in heavyball.PRESETS:
        assert f"│ {preset} " in result.stdout or f"left out {preset}" in result.stderr
    assert f"{ELEMENTS[name]:,} elements" in result.stdout


def test_one_optimizer_is_taken_apart():
    result = heavyball_command("AdamW:amsgrad=True", "-m", "resnet-18", "--dtype", "bfloat16")
    assert result.exit_code == 0, result.output
    plan = memory_plan(architecture("resnet-18", torch.bfloat16), "AdamW", amsgrad=True)
    assert plan.state_bytes == 12 * ELEMENTS["resnet-18"] + 8 * TENSORS["resnet-18"]
    assert f"{plan.state_bytes:,}" in result.stdout
    assert "bfloat16 parameters" in result.stdout
    for key, count in plan.per_transform.items():
        assert any(key in line and f"{count:,}" in line for line in result.stdout.splitlines())
    assert "(512, 512, 3, 3)" in result.stdout


def test_several_are_compared_smallest_first():
    result = heavyball_command("scale_by_adam | parameter_ema", "Lion", "SFAdamW", "-m", "vit-b-16")
    rows = [line for line in result.stdout.splitlines() if line.startswith("│")]
    assert [row.split("│")[1].strip() for row in rows] == [
        "Lion",
        "SFAdamW",
        "scale_by_adam | parameter_ema",
    ]
    assert [row.split("│")[3].strip() for row in rows] == ["4.000", "8.000", "12.000"]
    assert [row.split("│")[4].strip() for row in rows] == ["-", "+ 330.2 MiB", "+ 330.2 MiB"]
    assert math.isclose(330.2, ELEMENTS["vit-b-16"] * 4 / 2**20, abs_tol=0.05)


def test_formats_of_fewer_bits_are_planned():
    words = ["AdamW", "--dtype", "bfloat16", "--model", "resnet-18"]
    formats = [("storage_dtype", name) for name in ("8bit", "4bit", "rank1")]
    for option, value in (*formats, ("ecc", "bf16+8"), ("param_ecc", "bf16+16")):
        result = heavyball_command(*words, f"--{option.replace('_', '-')}", value)
        assert result.exit_code == 0, result.output
        params = architecture("resnet-18", torch.bfloat16)
        plan = memory_plan(params, "AdamW", **{option: value})
        assert f"{plan.state_bytes:,}" in result.stdout
        assert plan.state_bytes != memory_plan(params, "AdamW").state_bytes


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["AdamWW"], ["AdamW"]),
        (["AdamW:nonsense=1"], ["AdamW:nonsense=1", "nonsense"]),
        (["AdamW", "--model", "gpt2"], ["gpt2-124m"]),
        (["scale_by_adam | scale_by_lino"], ["scale_by_lion"]),
        (["torch.AdamW"], ["torch"]),
        (["--ecc", "bf16"], ["ecc", "bf16+8"]),
        (["--param-ecc", "bf16+8", "--dtype", "float32"], ["param_ecc"]),
    ],
)
def test_what_cannot_be_planned_is_refused_in_one_line(words, parts):
    result = heavyball_command(*words)
    assert result.exit_code == 2, result.output
    message = result.stderr.rpartition("Error: ")[2]
    assert len(message.strip().splitlines()) == 1
    assert all(part in message for part in parts)

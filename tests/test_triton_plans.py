"""How the Triton backend chooses a plan: the rule, tables of plans, the user's own among them, and what a device cannot run."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cases import message_of

from googlenet_fused.backends.triton import plan_table, plans
from googlenet_fused.backends.triton.plan_table import (
    add_to_table,
    forget_user_entries,
    read_table,
    user_entries,
    user_table,
)
from googlenet_fused.backends.triton.plans import (
    ARITHMETICS,
    DTYPES,
    INTERPRETER,
    MOST_RATIO,
    SHARED_MEMORY,
    Arithmetic,
    Config,
    Entry,
    Plan,
    Request,
    configurations,
    configurations_for,
    hopper_or_later,
    misfit,
    nearest,
    plan_for,
    rule,
    tiles,
    use_plan,
)
from googlenet_fused.spec import GOOGLENET_SIDES, GOOGLENET_SPECS, InceptionSpec

SPEC = GOOGLENET_SPECS["4a"]
SMALL = Config(32, 32, 64, 4, 4)
PLAN = Plan("fused", SMALL, Config(64, 64, 64, 4, 3))
ENTRY = Entry("sm_80", "fp16", SPEC, 8, 14, 15, PLAN, "NVIDIA A100-SXM4-40GB", "3.8.0")
REQUEST = Request("sm_80", 108, "fp16", SPEC, 8, 14, 15)

ARCHES = [*SHARED_MEMORY, "sm_121", "gfx90a"]

OTHERS: list[dict[str, Any]] = [
    *({"arch": "sm_86"}, {"arithmetic": "bf16"}, {"spec": replace(SPEC, large_kernel=3)}, {"height": 15}, {"width": 14}),
]
"""Other problems than that of ``ENTRY`` and ``REQUEST``, whatever the batch."""


@pytest.fixture(autouse=True)
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file of a user who has no table yet."""
    monkeypatch.setenv("GOOGLENET_FUSED_CACHE", str(tmp_path / "cache"))
    forget_user_entries()
    yield tmp_path / "cache/triton-plans.json"
    forget_user_entries()


@pytest.fixture
def fine_to_coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half precision has three configurations for each kernel, the last two of which run anywhere."""
    configs = [[128, 128, 64, 8, 3], [64, 64, 64, 4, 3], [32, 32, 64, 4, 4]]
    made_up = {"configurations": {"half": dict.fromkeys(plans.KERNELS, configs)}, "tuned": []}
    monkeypatch.setattr(plans, "_shipped", lambda: made_up)
    monkeypatch.setattr(plans, "configurations", configurations.__wrapped__)


def plan(rows: int) -> Plan:
    """One of many."""
    return replace(PLAN, pointwise=replace(SMALL, rows=rows))


# What fits.


@pytest.mark.parametrize(
    ("arch", "stages"),  # of 32 KiB each
    [
        *(("sm_80", 5), ("sm_86", 3), ("sm_89", 3), ("sm_90", 7), ("sm_100", 7), ("sm_103", 7), ("sm_120", 3)),
        *(("gfx942", 2), ("sm_121", 3), ("sm_87", 3), ("gfx90a", 2), ("gfx1100", 2)),
    ],
)
def test_tiles_must_fit_in_shared_memory(arch: str, stages: int) -> None:
    config = Config(128, 128, 64, 8, stages)
    assert misfit(config, "fp16", arch, "branch") is None
    more = misfit(replace(config, stages=stages + 1), "bf16", arch, "pointwise")
    assert more is not None
    assert f"128x128x64 8w {stages + 1}s needs {32 * (stages + 1)} KiB of shared memory, of which a block on {arch}" in more
    assert misfit(replace(config, depth=32, stages=stages), "tf32", arch, "pointwise") is None
    assert misfit(replace(config, depth=32, stages=stages + 1), "fp32", arch, "branch") is not None


def test_the_interpreter_has_no_shared_memory() -> None:
    assert misfit(Config(256, 256, 256, 4, 8), "fp32", INTERPRETER, "spatial") is None


# The rule.


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize("arch", ARCHES)
def test_the_rule_chooses_what_fits(arch: str, arithmetic: Arithmetic) -> None:
    for name, spec in GOOGLENET_SPECS.items():
        for batch in (1, 8, 128):
            side = GOOGLENET_SIDES[name]
            chosen = rule(Request(arch, 20, arithmetic, spec, batch, side, side))
            assert misfit(chosen.pointwise, arithmetic, arch, "pointwise") is None
            assert misfit(chosen.spatial, arithmetic, arch, "spatial") is None


@pytest.mark.usefixtures("fine_to_coarse")
@pytest.mark.parametrize(
    ("batch", "pointwise", "spatial"),
    [(1, 32, 32), (5, 32, 32), (6, 64, 32), (7, 64, 64), (15, 64, 64), (16, 128, 64), (21, 128, 64), (22, 128, 128)],
)
def test_the_rule_takes_the_largest_tiles_that_occupy_the_device(batch: int, pointwise: int, spatial: int) -> None:
    """A row of pixels has 4 tiles of 128 columns, 6 of 64 or 12 of 32, and 3, 5 or 9; there are 108 multiprocessors."""
    chosen = rule(replace(REQUEST, arch="sm_90", batch=batch))
    assert (chosen.form, chosen.pointwise.rows, chosen.spatial.rows) == ("merged", pointwise, spatial)


def test_tiles_of_several_products() -> None:
    assert tiles(129, Config(64, 32, 64, 4, 4), (32, 33)) == 3 * (1 + 2)


@pytest.mark.parametrize(
    ("arch", "hopper"), [("sm_80", False), ("sm_89", False), ("sm_90", True), ("sm_120", True), ("gfx942", False)]
)
def test_descriptors_and_dependent_launches_need_hopper(arch: str, hopper: bool) -> None:
    assert hopper_or_later(arch) is hopper
    chosen = rule(replace(REQUEST, arch=arch))
    assert (chosen.pointwise_tma, chosen.spatial_tma, chosen.pdl) == (hopper, False, hopper)
    assert not hopper_or_later(INTERPRETER)


@pytest.mark.parametrize("arithmetic", [*ARITHMETICS, INTERPRETER])
def test_the_shipped_configurations_are_in_order_and_the_last_runs_anywhere(arithmetic: Arithmetic) -> None:
    for kernel, configs in configurations(arithmetic).items():
        areas = [config.rows * config.columns for config in configs]
        assert areas == sorted(areas, reverse=True)
        assert len(set(configs)) == len(configs)
        if arithmetic in DTYPES:
            assert not any(misfit(configs[-1], arithmetic, arch, kernel) for arch in ARCHES)


@pytest.mark.usefixtures("fine_to_coarse")
def test_an_arch_has_the_configurations_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    assert configurations_for(replace(REQUEST, arch="sm_90")) == plans.configurations("fp16")
    every = plans.configurations("fp16")["spatial"]
    assert configurations_for(replace(REQUEST, arch="gfx942")) == {
        "pointwise": every[1:],
        "spatial": every[2:],
        "branch": every[1:],
    }
    assert rule(replace(REQUEST, arch="gfx942", batch=1000)).pointwise.rows == 64
    assert rule(replace(REQUEST, batch=1000)).pointwise.rows == 128


def test_the_spatial_kernel_holds_the_tiles_of_two_convolutions() -> None:
    config = Config(128, 128, 64, 8, 2)  # 64 KiB
    assert misfit(config, "fp16", "sm_120", "branch") is None
    assert "needs 128 KiB" in (misfit(config, "fp16", "sm_120", "spatial") or "")


def test_the_interpreter_has_configurations_of_its_own() -> None:
    assert configurations_for(replace(REQUEST, arch=INTERPRETER)) == configurations(INTERPRETER)


# Tables.


def test_the_nearest_batch_by_ratio() -> None:
    entries = [replace(ENTRY, batch=batch, plan=plan(rows)) for batch, rows in ((1, 16), (8, 32), (100, 64))]
    for batch, rows in ((1, 16), (2, 16), (3, 32), (8, 32), (28, 32), (29, 64), (100 * MOST_RATIO, 64)):
        found = nearest(entries, replace(REQUEST, batch=batch))
        assert found == plan(rows), batch


def test_a_batch_far_from_all_entries_has_the_rules_plan(table: Path) -> None:
    add_to_table(table, [replace(ENTRY, batch=batch) for batch in (2, 100)])
    for batch, near in ((1, True), (8, True), (9, False), (24, False), (25, True), (400, True), (401, False)):
        request = replace(REQUEST, batch=batch)
        assert plan_for(request) == (PLAN if near else rule(request)), batch


@pytest.mark.parametrize("other", OTHERS, ids=lambda other: next(iter(other)))
def test_an_entry_serves_its_own_problem_only(other: dict[str, Any]) -> None:
    assert nearest([ENTRY], REQUEST) == PLAN
    assert nearest([ENTRY], replace(REQUEST, **other)) is None
    assert nearest([ENTRY], replace(REQUEST, multiprocessors=1)) == PLAN


def test_an_entry_through_json() -> None:
    written = json.loads(json.dumps(ENTRY.to_json()))
    assert Entry.from_json(written) == ENTRY
    assert written["gpu"] == "NVIDIA A100-SXM4-40GB"
    assert written["triton"] == "3.8.0"
    assert written["widths"] == [480, 192, 96, 208, 16, 48, 64, 5]
    for name in ("gpu", "triton"):
        del written[name]
    assert Entry.from_json(written) == replace(ENTRY, gpu=None, triton=None)
    assert Entry.from_json(replace(ENTRY, gpu=None).to_json()).gpu is None


def test_a_plan_in_words() -> None:
    pointwise, spatial = replace(PLAN, pointwise_tma=True), replace(PLAN, form="merged", spatial_tma=True, pdl=True)
    assert str(pointwise) == "fused; pointwise 32x32x64 4w 4s, tma; spatial 64x64x64 4w 3s"
    assert str(spatial) == "merged; pointwise 32x32x64 4w 4s; spatial 64x64x64 4w 3s, tma; pdl"


WIDTHS = [480, 192, 96, 208, 16, 48, 64, 5]

MALFORMED: dict[str, tuple[dict[str, Any], str]] = {
    "arch": ({"arch": 90}, "arch must be a name such as 'sm_90', got 90"),
    "no arch": ({"arch": ""}, "arch must be a name"),
    "an arch of two lines": ({"arch": "gfx\n942"}, r"arch must be a name such as 'sm_90', got 'gfx\\n942'"),
    "an arch without a number": ({"arch": "sm_new"}, "arch must be a name such as 'sm_90', got 'sm_new'"),
    "a huge batch": ({"batch": 10**400}, r"batch must be less than 2\^31"),
    "a huge height": ({"height": 2**31}, r"height must be less than 2\^31"),
    "a huge width of images": ({"width": 2**31}, r"width must be less than 2\^31"),
    "a huge width": ({"widths": [2**31, 192, 96, 208, 16, 48, 64, 5]}, r"widths must be less than 2\^31"),
    "a gpu that rings": ({"gpu": "H100\a"}, r"gpu must be printable, got 'H100\\x07'"),
    "a version of two lines": ({"triton": "3\n8"}, r"triton must be printable, got '3\\n8'"),
    "arithmetic": ({"arithmetic": "fp8"}, "arithmetic must be one of fp16, bf16, tf32, fp32, got 'fp8'"),
    "batch": ({"batch": 0}, "batch must be a positive integer, got 0"),
    "height": ({"height": 7.0}, "height must be a positive integer, got 7.0"),
    "width": ({"width": True}, "width must be a positive integer, got True"),
    "gpu": ({"gpu": 5}, "gpu must be a text or null, got 5"),
    "triton": ({"triton": [3]}, r"triton must be a text or null, got \[3\]"),
    "too few widths": ({"widths": WIDTHS[:7]}, "widths must be 8 integers, in_channels, .*, large_kernel, got"),
    "no widths": ({"widths": 5}, "widths must be 8 integers"),
    "a width": ({"widths": [*WIDTHS[:6], 0, 5]}, "widths: .* pool_proj must be a positive integer, got 0"),
    "a kernel": ({"widths": [*WIDTHS[:7], 4]}, "widths: .* large_kernel must be 3 or 5, got 4"),
    "a fractional kernel": ({"widths": [*WIDTHS[:7], 5.0]}, "widths must be 8 integers"),
    "unknown": ({"ms": 3}, "an entry has the fields arch, .*, got"),
    "plan": ({"plan": []}, "plan: a plan has the fields form, .*, got"),
    "form": ({"plan.form": "molten"}, "plan: form must be one of merged, fused, got 'molten'"),
    "pdl": ({"plan.pdl": 1}, "plan: pdl must be true or false, got 1"),
    "pointwise_tma": ({"plan.pointwise_tma": None}, "plan: pointwise_tma must be true or false"),
    "spatial_tma": ({"plan.spatial_tma": "no"}, "plan: spatial_tma must be true or false"),
    "pdl too early": ({"plan.pdl": True}, "plan: pdl must be false on sm_80: it needs sm_90 or later"),
    "descriptors too early": ({"plan.spatial_tma": True}, "plan: spatial_tma must be false on sm_80"),
    "pointwise": ({"plan.pointwise": [64, 64, 64, 4]}, "plan: pointwise must be five integers, rows, .*, stages, got"),
    "spatial": ({"plan.spatial": "64"}, "plan: spatial must be five integers"),
    "a text": ({"plan.spatial": [64, 64, 64, 4, "3"]}, "plan: spatial must be five integers"),
    "rows": ({"plan.pointwise": [48, 64, 64, 4, 3]}, "plan: pointwise: rows must be a power of 2 from 16 to 256, got 48"),
    "columns": ({"plan.spatial": [64, 8, 64, 4, 3]}, "plan: spatial: columns must be a power of 2 from 16 to 256, got 8"),
    "depth": ({"plan.spatial": [64, 64, 512, 4, 1]}, "plan: spatial: depth must be a power of 2 from 16 to 256, got 512"),
    "warps": ({"plan.spatial": [64, 64, 64, 6, 3]}, "plan: spatial: warps must be a power of 2 from 1 to 16, got 6"),
    "stages": ({"plan.spatial": [64, 64, 64, 4, 9]}, "plan: spatial: stages must be from 1 to 8, got 9"),
    "pointwise too large": (
        {"plan.pointwise": [128, 128, 64, 8, 6]},
        "plan: pointwise: 128x128x64 8w 6s needs 192 KiB of shared memory, of which a block on sm_80 may have 163",
    ),
    "spatial too large": ({"plan.spatial": [128, 128, 64, 8, 6]}, "plan: spatial: .* needs 192 KiB of shared memory"),
}


def changed(changes: dict[str, Any]) -> dict[str, Any]:
    data = ENTRY.to_json()
    for name, value in changes.items():
        owner, _, field = name.rpartition(".")
        (data[owner] if owner else data)[field] = value
    return data


@pytest.mark.parametrize(("changes", "said"), MALFORMED.values(), ids=MALFORMED)
def test_what_is_wrong_with_an_entry_is_said(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said) as error:
        Entry.from_json(changed(changes))
    message_of(error)


@pytest.mark.parametrize(
    "missing", ["arch", "arithmetic", "widths", "batch", "height", "width", "plan", "plan.form", "plan.spatial"]
)
def test_a_missing_field_is_said(missing: str) -> None:
    data = ENTRY.to_json()
    owner, _, field = missing.rpartition(".")
    del (data[owner] if owner else data)[field]
    with pytest.raises(ValueError, match=f"has the fields .*{field}.*, got"):
        Entry.from_json(data)


def test_the_shipped_table_is_well_formed() -> None:
    entries = plans.shipped_entries()
    assert len({entry.key for entry in entries}) == len(entries)


# The user's table, and which comes first.


def test_what_is_added_is_read_and_takes_the_place_of_the_same_problems_entry(table: Path) -> None:
    assert user_table() == table
    add_to_table(table, [])
    assert json.loads(table.read_text()) == {"format": 1, "entries": []}
    others = [replace(ENTRY, **other) for other in (*OTHERS, {"batch": 9})]
    add_to_table(table, [ENTRY, *others])
    newer = replace(ENTRY, plan=plan(64), gpu="another", triton=None)
    add_to_table(table, [newer])
    assert sorted(map(str, read_table(table))) == sorted(map(str, [newer, *others]))


def test_the_order_of_tables(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert plan_for(REQUEST) == rule(REQUEST)
    forget_user_entries()
    monkeypatch.setattr(plans, "shipped_entries", lambda: (replace(ENTRY, plan=plan(16)),))
    assert plan_for(REQUEST) == plan(16)
    add_to_table(table, [replace(ENTRY, batch=32, plan=plan(64)), replace(ENTRY, arch="sm_90", plan=plan(128))])
    assert plan_for(REQUEST) == plan(16), "a table is read once"
    forget_user_entries()
    assert plan_for(REQUEST) == plan(64), "the user's goes first, though its batch is another"
    assert plan_for(replace(REQUEST, arithmetic="bf16")) == rule(replace(REQUEST, arithmetic="bf16"))
    with use_plan(plan(256)):
        assert plan_for(REQUEST) == plan(256)
    assert plan_for(REQUEST) == plan(64)
    table.unlink()
    forget_user_entries()
    assert plan_for(REQUEST) == plan(16)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is not JSON"),
        ("[]", "must hold a format and a list of entries: googlenet-fused tune --forget removes it"),
        ('{"format": 1}', "must hold a format and a list of entries"),
        ('{"format": 1, "entries": {}}', "must hold a format and a list of entries"),
        ('{"format": 1, "entries": [], "more": 1}', "must hold a format and a list of entries"),
        ('{"format": true, "entries": []}', "has format True, and only 1 is known here"),
        ('{"format": 1.0, "entries": []}', "has format 1.0, and only 1 is known here"),
        ('{"format": 2, "entries": []}', "has format 2, and only 1 is known here: googlenet-fused tune --forget removes it"),
        ('{"format": 1, "entries": [3]}', "entry 0: an entry has the fields .*: googlenet-fused tune --forget removes it"),
        (
            json.dumps({"format": 1, "entries": [ENTRY.to_json(), changed({"batch": "8"})]}),
            "entry 1: batch must be a positive integer, got '8': googlenet-fused tune --forget removes it",
        ),
    ],
)
def test_a_broken_table_is_said_once_and_not_used(
    content: str, said: str, table: Path, caplog: pytest.LogCaptureFixture
) -> None:
    add_to_table(table, [])
    table.write_text(content)
    with pytest.raises(ValueError, match=said) as error:
        read_table(table)
    message = message_of(error)
    assert str(table) in message
    for batch in (1, 2, 3):
        assert plan_for(replace(REQUEST, batch=batch)) == rule(replace(REQUEST, batch=batch))
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("googlenet_fused", "WARNING")
    assert record.getMessage() == f"the user's table of plans is not used: {message}"
    with pytest.raises(ValueError, match=said):
        add_to_table(table, [ENTRY])
    assert table.read_text() == content, "it is left for the user to look at"


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="needs user ids")
def test_an_unsafe_table_is_said_once_and_not_used(table: Path, caplog: pytest.LogCaptureFixture) -> None:
    add_to_table(table, [ENTRY])
    table.chmod(0o666)
    assert plan_for(REQUEST) == rule(REQUEST)
    assert user_entries() == ()
    (record,) = caplog.records
    assert f"{table} is not safe: its group or others may write to {table}; chmod go-w" in record.getMessage()


def test_a_user_without_a_home_has_no_table(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def homeless() -> Path:
        raise OSError("there is no folder for the cache")

    monkeypatch.setattr(plan_table, "cache_folder", homeless)
    assert plan_for(REQUEST) == rule(REQUEST)
    (record,) = caplog.records
    assert "there is no folder for the cache" in record.getMessage()


def test_a_missing_table_is_no_news(caplog: pytest.LogCaptureFixture) -> None:
    assert plan_for(REQUEST) == rule(REQUEST)
    assert not caplog.records


def test_a_module_of_ones_has_a_plan() -> None:
    request = Request("sm_90", 132, "fp32", InceptionSpec(1, 1, 1, 1, 1, 1, 1), 1, 1, 1)
    assert rule(request).pointwise == configurations("fp32")["pointwise"][-1]

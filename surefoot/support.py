"""The support matrix: method x quantization x engine x compile x packing, each cell tested, refused or untested.

The plan refuses from it, the tests take their cases from it, and scripts/support_table.py writes docs/support.md from it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

METHODS = ("lora", "dora", "rslora", "full")
QUANTIZATIONS = ("none", "nf4", "int8")
ENGINES = ("single", "ddp", "zero2", "zero3", "fsdp2", "unsloth")
BOTH = (False, True)
ADAPTERS = METHODS[:3]


class Cell(NamedTuple):
    """One combination, in the plan's words."""

    method: str
    quantization: str
    engine: str
    compiles: bool
    packs: bool

    def __str__(self) -> str:
        words = [self.method, self.quantization, self.engine]
        return "-".join([*words, *["compile"] * self.compiles, *["packing"] * self.packs])


@dataclass(frozen=True, kw_only=True)
class Cells:
    """The cells whose every coordinate is among these."""

    methods: tuple[str, ...] = METHODS
    quantizations: tuple[str, ...] = QUANTIZATIONS
    engines: tuple[str, ...] = ENGINES
    compiles: tuple[bool, ...] = BOTH
    packs: tuple[bool, ...] = BOTH

    def __iter__(self) -> Iterator[Cell]:
        return itertools.starmap(Cell, itertools.product(self.methods, self.quantizations, self.engines, self.compiles, self.packs))

    def __contains__(self, cell: Cell) -> bool:
        among = (self.methods, self.quantizations, self.engines, self.compiles, self.packs)
        return all(value in values for value, values in zip(cell, among, strict=True))


class Refusal(NamedTuple):
    """Why cells cannot be run. device: cpu where only a CPU cannot; thread: where it was reported, or how it was seen here."""

    cells: Cells
    reason: str
    way_out: str
    thread: str = ""
    device: str = ""


class Test(NamedTuple):
    """A test that runs cells, which are its cases. ran: where and with what it last passed, "" where it has not been run yet."""

    name: str
    cells: tuple[Cells, ...]
    ran: str


class Verdict(NamedTuple):
    """state is tested, refused or untested."""

    state: str
    tests: tuple[str, ...] = ()
    refusal: Refusal | None = None


REFUSED = (
    Refusal(
        Cells(methods=("full",), quantizations=("nf4", "int8")),
        "quantized weights cannot be trained",
        "Drop --load_4bit or --load_8bit, or use --adapter_name=dora",
    ),
    Refusal(
        Cells(methods=("dora",), quantizations=("int8",)),
        "fails on a CPU (bitsandbytes 0.50 has no weight gradient there)",
        "Use --load_4bit=True, or --adapter_name=lora",
        "seen here: AttributeError in bitsandbytes' autograd",
        "cpu",
    ),
)

PLAIN, FAST = (False,), (True,)
ENGINES_OF_TWO = ENGINES[1:5]
ON_CPU = "2026-11-21, two CPU cores, scripts/dev.lock"
ON_GPU = "2026-11-21, one H200, torch 2.11.0+cu130, bitsandbytes 0.50.2"
FILE = "tests/test_engines.py::"
TESTS = (
    Test(
        f"{FILE}test_cell_when_one_process_runs_it_then_learns",
        (
            Cells(quantizations=("none",), engines=("single",), compiles=PLAIN),
            Cells(methods=ADAPTERS, quantizations=("nf4",), engines=("single",), compiles=PLAIN),
            Cells(methods=("lora", "rslora"), quantizations=("int8",), engines=("single",), compiles=PLAIN),
        ),
        ON_CPU,
    ),
    Test(
        f"{FILE}test_cell_when_two_processes_run_it_then_losses_and_adapter_are_those_of_one",
        (
            Cells(quantizations=("none",), engines=ENGINES_OF_TWO, compiles=PLAIN, packs=PLAIN),
            Cells(methods=("lora", "dora"), quantizations=("nf4",), engines=ENGINES_OF_TWO, compiles=PLAIN, packs=PLAIN),
            Cells(methods=("lora", "dora"), quantizations=("none",), engines=ENGINES_OF_TWO, compiles=PLAIN, packs=(True,)),
        ),
        ON_CPU,
    ),
    Test(
        "tests/test_torture.py::test_cell_when_killed_at_random_places_then_goes_on_bitwise",
        (
            Cells(methods=("lora",), quantizations=("none",), engines=("single", "zero2"), compiles=PLAIN, packs=PLAIN),
            Cells(methods=("lora",), quantizations=("none",), engines=("ddp", "zero3", "fsdp2"), compiles=PLAIN, packs=(True,)),
            Cells(methods=("dora",), quantizations=("none",), engines=("single", "zero2"), compiles=PLAIN, packs=(True,)),
            Cells(methods=("dora",), quantizations=("none",), engines=("ddp", "zero3", "fsdp2"), compiles=PLAIN, packs=PLAIN),
            Cells(methods=("lora",), quantizations=("nf4",), engines=ENGINES[:5], compiles=PLAIN, packs=PLAIN),
        ),
        ON_CPU,
    ),
    Test(
        f"{FILE}test_cell_when_a_gpu_runs_it_then_learns",
        (
            Cells(methods=("lora", "dora"), engines=("single",), compiles=FAST),
            Cells(methods=("dora",), quantizations=("int8",), engines=("single",), compiles=PLAIN),
        ),
        ON_GPU,
    ),
    Test(
        "tests/test_gpu_unsloth.py::test_unsloth_when_on_a_gpu_then_trains_as_hf_does_and_says_what_ran",
        (
            Cells(methods=("lora", "dora"), quantizations=("none",), engines=("unsloth",), compiles=PLAIN, packs=PLAIN),
            Cells(methods=("lora",), quantizations=("nf4",), engines=("unsloth",), compiles=PLAIN, packs=PLAIN),
        ),
        f"{ON_GPU}, unsloth 2026.10.9",
    ),
    Test(
        f"{FILE}test_cell_when_two_gpus_run_it_then_losses_and_adapter_are_those_of_one",
        (Cells(methods=("lora", "dora"), quantizations=("none", "nf4"), engines=ENGINES_OF_TWO, compiles=FAST, packs=PLAIN),),
        "",
    ),
)


def refusal(cell: Cell, device: str) -> Refusal | None:
    """Why `cell` is refused on a device (cpu or gpu), None where it is not."""
    return next((one for one in REFUSED if cell in one.cells and one.device in ("", device)), None)


def verdict(cell: Cell) -> Verdict:
    """What is known of a cell, on whatever device. A test's word counts more than a refusal on one device only."""
    tests = tuple(test.name for test in TESTS if test.ran and cell in cells_of(test.name))
    if tests:
        return Verdict("tested", tests)
    found = next((one for one in REFUSED if cell in one.cells), None)
    return Verdict("refused", refusal=found) if found else Verdict("untested")


def cells_of(name: str) -> tuple[Cell, ...]:
    """The cells that a test of TESTS runs."""
    (test,) = [one for one in TESTS if one.name == name]
    return tuple(dict.fromkeys(itertools.chain.from_iterable(test.cells)))


def every_cell() -> Iterator[Cell]:
    return iter(Cells())

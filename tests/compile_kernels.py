"""Compiles Triton's kernels for a CUDA device that need not be there, and prints their names."""

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from truestep.kernels.gpu import boosts, counts, entries, launches, lookups, packs, steps

TILE = {"FIELDS": entries.FIELDS, "ROW": counts.ROW, "COLUMN": counts.COLUMN}
PACKED = {"FIELDS": packs.PACK_FIELDS, "ROW": packs.BY_ROW, "UNIT": packs.BY_UNIT}
LOOKED = {"FIELDS": lookups.FIELDS}
STORED = [{"KEPT": kept, "NUMBER": number} for kept, number in launches.STORED.values()]
KERNELS = [
    *(
        (packs._pack, PACKED | {"MEANS": means, "NUMBER": number, "FLOAT": packs.FLOATS.get(size)})
        for size, number in packs.NUMBERS.items()
        for means in {False, size in packs.FLOATS}
    ),
    (packs._join, {"FIELDS": packs.JOIN_FIELDS, "UNIT": packs.JOINED}),
    (packs._unfold, {"FIELDS": packs.UNFOLD_FIELDS, "COLUMN": packs.UNFOLDED}),
    (lookups._give_slots, LOOKED | {"BLOCK": lookups.SLOTS}),
    (
        lookups._count,
        LOOKED | {"WORD": launches.WORD, "ENTRIES": lookups.ENTRIES, "COLUMN": lookups.COLUMN},
    ),
    (entries._sum, TILE),
    *((steps._step, TILE | stored) for stored in STORED),
    *(
        (boosts._boost, {"STEPS": step, "BLOCK": boosts.BLOCK} | stored)
        for step in (True, False)
        for stored in STORED
    ),
]


def main():
    for kernel, known in KERNELS:
        names = kernel.arg_names
        kinds = {
            name: "constexpr" if name in known else "i32" if name == "lines" else "*i64"
            for name in names
        }
        places = {(names.index(name),): value for name, value in known.items()}
        source = ASTSource(fn=kernel, signature=kinds, constexprs=places)
        code = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
        assert ".target sm_90" in code
        if known.get("KEPT") is tl.bfloat16:
            assert "cvt.rn.bf16" in code, "not rounded to the nearest"
        print(kernel.__name__, tl.constexpr(known.get("KEPT", known.get("NUMBER"))).value)  # noqa: T201


if __name__ == "__main__":
    main()

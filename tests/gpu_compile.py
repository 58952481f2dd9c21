"""Compiles every Triton kernel for a GPU that need not be here: type errors that the interpreter
does not see show. Run as a program: `python tests/gpu_compile.py`, without TRITON_INTERPRET."""

from __future__ import annotations

import sys
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from moelite.gpu import triton_attend, triton_rows, triton_steps, triton_tiles
from moelite.gpu.triton_products import CODES, COLS, ROWS, UNPACK_CHUNK, Shape, tile_constants
from moelite.gpu.unpack import BLOCK_BYTES

TARGET = GPUTarget("cuda", 90, 32)
POINTERS = {
    **dict.fromkeys(("x", "out", "parts", "weights", "weight", "bias", "both"), "*fp32"),
    **dict.fromkeys(("state", "mixed", "q", "gate"), "*fp32"),
    **dict.fromkeys(("k", "v"), "*fp16"),
    **dict.fromkeys(("masks", "length"), "*i32"),
    "packed": "*u8",
    "bases": "*i64",
    "target": "*i64",
    "eps": "fp32",
    "scale": "fp32",
}


def compiled(kernel: Any, constants: dict[str, Any], tables: dict[str, str], **options: Any) -> Any:
    """The kernel compiled with some constants; every other argument is a pointer or an i32."""
    signature = {}
    for name in kernel.arg_names:
        kind = POINTERS.get(name, "i32")
        signature[name] = "constexpr" if name in constants else tables.get(name, kind)
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*")
    }
    source = ASTSource(kernel, signature, places, aligned)
    return triton.compile(source, target=TARGET, options=options)


def tiles(name: str) -> list[Any]:
    """Both kernels of a format of tiles, as `experts`, `linear` and `unpack` start them."""
    tables, constants = tile_constants(name, 2048, torch.device("cpu"))
    cut, kinds = Shape(), {torch.int32: "*i32", torch.float32: "*fp32"}
    given: dict[str, Any] = dict(constants)
    types = {}
    for which, table in zip(("table", "second"), tables, strict=True):
        if table is None:
            given[which] = None
        else:
            types[which] = kinds[table.dtype]
    shape = {"TILES": cut.tiles, "CHUNK": cut.units * constants["UNIT"] // 32}
    alone = {"bases": None, "target": None}
    return [
        compiled(triton_tiles.gemv_tiles, given | shape, types, num_warps=cut.warps),
        compiled(triton_tiles.gemv_tiles, given | shape | alone, types, num_warps=cut.warps),
        compiled(triton_tiles.unpack_tiles, given | {"CHUNK": UNPACK_CHUNK}, types),
    ]


def rows(name: str) -> list[Any]:
    """The kernels of a format that lies row after row."""
    if name in ("f32", "bf16"):
        constants = {"HALF": name == "bf16", "ROWS": ROWS, "COLS": COLS}
        return [compiled(triton_rows.gemv_rows, constants, {})]
    kernels = triton_rows.gemv_qmoe, triton_rows.unpack_qmoe
    return [compiled(kernel, {"CODES": CODES}, {}, num_warps=1) for kernel in kernels]


def steps() -> list[Any]:
    """What comes between products."""
    found = []
    for planes in (0, 1, 2):
        some = {"PLANES": planes, "BLOCKS": 16}
        found.append(compiled(triton_steps.round_rows, some, {}, enable_fp_fusion=False))
        found.append(compiled(triton_steps.gate_rows, some, {}, enable_fp_fusion=False))
        for centred, none in ((True, {}), (False, {"bias": None}), (False, {"weight": None})):
            norm = some | none | {"CENTRED": centred, "BLOCKS": 64}
            found.append(compiled(triton_steps.norm_rows, norm, {}, num_warps=8))
    for none in ({}, {"gate": None}):
        add = compiled(triton_steps.add_rows, {"BLOCK": 256, **none}, {}, num_warps=2)
        found.append(add)
    return found


def attention() -> list[Any]:
    """Of heads of 64 and 80 values that share a kv head by one, two and four."""
    found = []
    for together, size, wide in ((1, 128, 128), (2, 80, 128), (4, 64, 64)):
        both = {"SIZE": size, "WIDE": wide, "SPLITS": 16}
        more = {"HEADS": together, "GROUP": together, "BLOCK": 16}
        for none in ({}, {"length": None}):
            split = compiled(triton_attend.attend_split, both | more | none, {})
            found.append(split)
        found.append(compiled(triton_attend.attend_join, both, {}))
    return found


def main(names: list[str]) -> None:
    """Compiles and prints the registers' spilling and shared memory of each kernel."""
    for name in names:
        if name in ("steps", "attention"):
            kernels = {"steps": steps, "attention": attention}[name]()
        else:
            kernels = (tiles if name in BLOCK_BYTES else rows)(name)
        for kernel in kernels:
            loads = kernel.asm["ptx"].count("ld.global.v4")
            sys.stdout.write(f"{name} {kernel.name} shared {kernel.metadata.shared} v4 {loads}\n")


if __name__ == "__main__":
    main(sys.argv[1:])

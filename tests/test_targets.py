"""What words become on CPUs that need not be here: their instructions, and their results.

The lowerings of moelite.simd are emitted for each target by LLVM. Their assembly is searched for
the instructions that were meant and for calls, of which there may be none. Where a cross linker and
an emulator are installed (Debian: gcc-aarch64-linux-gnu, qemu-user), the code for ARM is run too.
"""

from __future__ import annotations

import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llvmlite import binding, ir

from moelite import lowering

X86, ARM = "x86_64-unknown-linux-gnu", "aarch64-unknown-linux-gnu"
# name: (lowering, triple, cpu, features, native halves)
TARGETS = {
    "vbmi": ("vbmi", X86, "icelake-server", "", True),
    "vnni": ("vnni", X86, "cascadelake", "", True),
    "avx2": ("avx2", X86, "haswell", "", True),
    "neon": ("neon", ARM, "cortex-a76", "+dotprod", True),
    "plain-arm": ("plain", ARM, "cortex-a53", "", True),
    "plain-x86": ("plain", X86, "x86-64", "", False),
}
INSTRUCTIONS = {
    "vbmi": {"dot_u7": ["vpdpbusd"], "lookup_low": ["vpermb"], "lookup_high": ["vpermb"]},
    "vnni": {
        "dot_u7": ["vpdpbusd"],
        "dot_i8": ["vpdpbusd", "vpsignb"],
        "lookup_low": ["vpshufb"],
        "lookup_high": ["vpshufb", "vpsrlw"],
    },
    "avx2": {
        "dot_u7": ["vpmaddubsw", "vpmaddwd"],
        "dot_i8": ["vpmaddubsw", "vpsignb"],
        "lookup_low": ["vpshufb"],
    },
    "neon": {
        "dot_u7": ["sdot"],
        "dot_i8": ["sdot"],
        "lookup_low": ["tbl"],
        "half_to_f32": ["fcvtl"],
    },
    "plain-arm": {"f32_to_half": ["fcvtn"]},
    "plain-x86": {"dot_u7": ["pmaddwd"]},
}
_I8X32, _I32X8, _F32X8, _I16X8 = (
    lowering.I8X32,
    lowering.I32X8,
    lowering.F32X8,
    lowering.I16X8,
)
# word: (types of its arguments, emit(builder, target, native halves, arguments))
WORDS: dict[str, tuple[list[Any], Any]] = {
    "dot_u7": ([_I32X8, _I8X32, _I8X32], lambda b, t, n, a: lowering.dot_u7(b, t, *a)),
    "dot_i8": ([_I32X8, _I8X32, _I8X32], lambda b, t, n, a: lowering.dot_i8(b, t, *a)),
    "lookup_low": ([_I8X32, _I8X32], lambda b, t, n, a: lowering.lookup_low(b, t, *a)),
    "lookup_high": ([_I8X32, _I8X32], lambda b, t, n, a: lowering.lookup_high(b, t, *a)),
    "half_to_f32": ([_I16X8], lambda b, t, n, a: lowering.half_to_f32(b, n, *a)),
    "f32_to_half": ([_F32X8], lambda b, t, n, a: lowering.f32_to_half(b, n, *a)),
    "bits": ([lowering.I32, lowering.I32], lambda b, t, n, a: lowering.bits(b, *a)),
    "sums": ([_F32X8] * 8, lambda b, t, n, a: lowering.sums(b, tuple(a))),
}


@cache
def emitted(name: str) -> tuple[str, bytes]:
    """(assembly, object file) of void word(bytes *arguments, bytes *result) for every word."""
    target, triple, cpu, features, native = TARGETS[name]
    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    module = ir.Module()
    module.triple = triple
    pointer = ir.IntType(8).as_pointer()
    for word, (kinds, emit) in WORDS.items():
        function = ir.Function(module, ir.FunctionType(ir.VoidType(), [pointer, pointer]), word)
        b = ir.IRBuilder(function.append_basic_block())
        arguments = []
        for i, kind in enumerate(kinds):
            at = b.gep(function.args[0], [ir.Constant(lowering.I64, 32 * i)])
            arguments.append(b.load(b.bitcast(at, kind.as_pointer()), align=1))
        result = emit(b, target, native, arguments)
        to = b.bitcast(function.args[1], result.type.as_pointer())
        b.store(result, to, align=1)
        b.ret_void()
    parsed = binding.parse_assembly(str(module))
    machine = binding.Target.from_triple(triple).create_target_machine(
        cpu=cpu, features=features, opt=3
    )
    return machine.emit_assembly(parsed), machine.emit_object(parsed)


def body(assembly: str, word: str) -> list[list[str]]:
    """The instructions of a function, split into words."""
    lines = assembly.split(f"\n{word}:", 1)[1].split(".Lfunc_end", 1)[0].splitlines()
    return [line.split() for line in lines if line.startswith("\t") and "." not in line.split()[0]]


@pytest.mark.parametrize("name", TARGETS)
def test_words_become_the_instructions_meant(name: str) -> None:
    assembly, _ = emitted(name)
    for word, wanted in INSTRUCTIONS[name].items():
        found = {parts[0] for parts in body(assembly, word)}
        assert set(wanted) <= found, (word, found)
    for word in WORDS:
        used = {parts[0] for parts in body(assembly, word)}
        assert not used & {"bl", "blr", "callq", "call"}, f"{word} calls a library"


def test_a_dot_product_of_32_is_one_or_two_instructions() -> None:
    for name, instruction, count in (
        ("vbmi", "vpdpbusd", 1),
        ("vnni", "vpdpbusd", 1),
        ("neon", "sdot", 2),
    ):
        found = [parts[0] for parts in body(emitted(name)[0], "dot_u7")]
        assert found.count(instruction) == count


_DRIVER = """
#include <stdio.h>
#include <string.h>
%s
typedef void word(const char *, char *);
int main(void) {
    char name[16], in[256], out[32];
    while (fread(name, 16, 1, stdin) == 1 && fread(in, 256, 1, stdin) == 1) {
        memset(out, 0, 32);
        %s
        fwrite(out, 32, 1, stdout);
    }
    return 0;
}
"""


@cache
def program(name: str, folder: Path) -> Path:
    """The words of a target, linked into a program that runs them on what it is sent."""
    source = folder / "driver.c"
    declared = "\n".join(f"void {word}(const char *, char *);" for word in WORDS)
    calls = "\n".join(f'if (!strcmp(name, "{word}")) {word}(in, out);' for word in WORDS)
    source.write_text(_DRIVER % (declared, calls))
    (folder / "words.o").write_bytes(emitted(name)[1])
    out = folder / name
    linker = "aarch64-linux-gnu-gcc" if TARGETS[name][1] == ARM else "gcc"
    command = [linker, "-static", "-O1", "-o", out, source, folder / "words.o"]
    subprocess.run(command, check=True)
    return out


def cases() -> list[tuple[str, list[np.ndarray], np.ndarray]]:
    """(word, arguments, result by numpy): random ones, and the extremes of integers and halves."""
    rng, out = np.random.default_rng(0), []
    for i in range(60):
        acc = rng.integers(-(2**20), 2**20, 8).astype(np.int32)
        w = rng.integers(0, 128, 32).astype(np.int8)
        x = rng.integers(-127, 128, 32).astype(np.int8)
        if i % 3 == 0:  # every product at its limit: pair sums of 32,258 in int16
            w[:], x = 127, np.where(rng.integers(0, 2, 32), 127, -127).astype(np.int8)
        if i % 6 == 0:
            x[:] = 127 if i % 12 else -127
        signed = np.where(rng.integers(0, 2, 32), w, -w).astype(np.int8)
        for word, left in (("dot_u7", w), ("dot_i8", signed)):
            products = left.astype(np.int64) * x
            out.append((word, [acc, left, x], acc + products.reshape(8, 4).sum(1)))
        table, codes = rng.integers(-128, 128, 16).astype(np.int8), rng.integers(0, 256, 32)
        arguments = [np.tile(table, 2), codes.astype(np.uint8)]
        out.append(("lookup_low", arguments, table[codes & 15]))
        out.append(("lookup_high", arguments, table[codes >> 4]))
        masks = rng.integers(0, 2**32, 2).astype(np.uint32)
        masks[1] &= ~masks[0]
        places = np.unpackbits(masks.view(np.uint8).reshape(2, 4), axis=1, bitorder="little")
        out.append(("bits", [masks[:1], masks[1:]], places[0] + 2 * places[1]))
        halves = rng.integers(0, 0x7C00, 8).astype(np.uint16) | (rng.integers(0, 2, 8) << 15)
        halves = halves.astype(np.uint16)
        out.append(("half_to_f32", [halves], halves.view(np.float16).astype(np.float32)))
        floats = (rng.normal(size=8) * 10.0 ** rng.integers(-9, 5, 8)).astype(np.float32)
        floats[0] = [0.0, 65504.0, -65504.0, 2.0**-24, 2.0**-25, 6.1e-5][i % 6]
        out.append(("f32_to_half", [floats], floats.astype(np.float16).view(np.uint16)))
        vectors = rng.normal(size=(8, 8)).astype(np.float32)
        two = vectors[:, :4] + vectors[:, 4:]
        one = two[:, :2] + two[:, 2:]
        out.append(("sums", list(vectors), one[:, 0] + one[:, 1]))
    return out


def runner(name: str) -> list[str] | None:
    """How to run a target's program here, or None."""
    if TARGETS[name][1] == ARM:
        emulator = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
        linker = shutil.which("aarch64-linux-gnu-gcc")
        return [emulator, "-cpu", "max"] if emulator and linker else None
    ours = binding.get_host_cpu_features()
    vnni = ("avx512vnni", "avx512vl")
    needed = {"vbmi": (*vnni, "avx512vbmi"), "vnni": vnni, "avx2": ("avx2", "fma", "f16c")}
    here = binding.get_process_triple().startswith("x86_64-") and all(
        ours.get(f) for f in needed.get(name, ())
    )
    return [] if here and shutil.which("gcc") else None


@pytest.mark.parametrize("name", TARGETS)
def test_words_give_what_numpy_gives(name: str, tmp_path: Path) -> None:
    run = runner(name)
    if run is None:
        pytest.skip(f"no compiler, emulator or CPU for {name} here")
    sent = b""
    for word, arguments, _ in cases():
        packed = b"".join(a.tobytes().ljust(32, b"\0") for a in arguments)
        sent += word.encode().ljust(16, b"\0") + packed.ljust(256, b"\0")
    command = [*run, str(program(name, tmp_path))]
    done = subprocess.run(command, input=sent, capture_output=True, check=True).stdout
    results = [done[i : i + 32] for i in range(0, len(done), 32)]
    assert len(results) == len(cases())
    for (word, arguments, want), result in zip(cases(), results, strict=True):
        kind = np.int32 if word.startswith("dot") else want.dtype
        got = np.frombuffer(result, kind)[: want.size]
        np.testing.assert_array_equal(got, want, f"{word} of {arguments} on {name}")

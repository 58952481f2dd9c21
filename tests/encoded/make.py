"""Makes the files beside it: one small matrix each, encoded by the library whose format it is.

    python tests/encoded/make.py AUTO_GPTQ GPTQMODEL AUTOAWQ

Needs compressed-tensors, bitsandbytes, transformers and torch installed, and the three folders
unpacked from their PyPI files (auto_gptq 0.7.1's wheel, gptqmodel's and autoawq's source archives):
only their Python is used, so nothing is compiled. A file holds the parts as "m.<part>", the matrix
"want" as the library decodes it in float32, and as metadata the library and the config.json entry.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
import types
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

HERE = Path(__file__).parent
torch.manual_seed(7)


def weight(rows: int, cols: int) -> torch.Tensor:
    return torch.randn(rows, cols) * 0.1 * (1 + torch.arange(rows)[:, None] / rows)


def write(
    name: str, parts: dict[str, torch.Tensor], want: torch.Tensor, config: Any, library: str
) -> None:
    assert want.dtype == torch.float32, want.dtype
    tensors = {f"m.{part}": value.contiguous() for part, value in parts.items()}
    tensors["want"] = want.contiguous()
    meta = {"config": json.dumps(config), "library": library}
    save_file(tensors, HERE / f"{name}.safetensors", meta)


# --- compressed-tensors ---


def scales(
    w: torch.Tensor, group: int, bits: int, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zero points [rows, groups] of groups of `group` columns."""
    parts = w.reshape(len(w), -1, group)
    if symmetric:
        scale = parts.abs().amax(-1) / (2 ** (bits - 1) - 1)
        return scale, torch.zeros(scale.shape, dtype=torch.int8)
    low, high = parts.amin(-1).clamp(max=0), parts.amax(-1).clamp(min=0)
    scale = (high - low) / (2**bits - 1)
    zero = torch.round(-low / scale) - 2 ** (bits - 1)
    return scale, zero.to(torch.int8)


def compressed(
    name: str,
    layout: str,
    args: dict[str, Any],
    w: torch.Tensor,
    scale: torch.Tensor,
    extra: dict[str, torch.Tensor] | None = None,
    activations: bool = False,
) -> None:
    import compressed_tensors as ct
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    weights = QuantizationArgs(**args)
    scheme = QuantizationScheme(
        targets=["Linear"],
        weights=weights,
        input_activations=QuantizationArgs(num_bits=8, dynamic=True) if activations else None,
    )
    compressor = BaseCompressor.get_value_from_registry(layout)
    parts = compressor.compress({"weight": w, "weight_scale": scale} | (extra or {}), scheme)
    # its decoder multiplies in the dtype of the scales
    exact = {
        k: v.float() if v.dtype in (torch.bfloat16, torch.float16) else v for k, v in parts.items()
    }
    want = compressor.decompress(dict(exact), scheme)["weight"].float()
    if layout == "nvfp4-pack-quantized":  # its decoder rounds to bf16 at last
        from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
        from compressed_tensors.quantization.lifecycle.forward import dequantize

        want = dequantize(
            x_q=unpack_fp4_from_uint8(parts["weight_packed"], *w.shape, dtype=torch.float32),
            scale=parts["weight_scale"].float(),
            args=weights,
            global_scale=parts["weight_global_scale"],
            dtype=torch.float32,
        )
    group = json.loads(scheme.model_dump_json())
    config = {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }
    write(f"ct-{name}", parts, want, config, f"compressed-tensors {ct.__version__}")


def all_compressed() -> None:
    def packed(name: str, bits: int, group: int, symmetric: bool, dtype: torch.dtype) -> None:
        w = weight(40, 64)
        scale, zero = scales(w, group, bits, symmetric)
        args = {"num_bits": bits, "strategy": "group", "group_size": group, "symmetric": symmetric}
        extra = {"weight_zero_point": zero}
        compressed(name, "pack-quantized", args, w, scale.to(dtype), extra)

    packed("int4-g32", 4, 32, True, torch.bfloat16)
    packed("int4-g32-asym", 4, 32, False, torch.float16)
    packed("int8-g64", 8, 64, True, torch.float32)
    packed("int3-g32-asym", 3, 32, False, torch.float32)
    w = weight(12, 100)
    scale, zero = scales(w, 100, 4, False)
    args = {"num_bits": 4, "strategy": "channel", "symmetric": False}
    compressed("int4-channel-asym", "pack-quantized", args, w, scale, {"weight_zero_point": zero})
    compressed_bytes()
    compressed_four()


def compressed_bytes() -> None:
    w = weight(24, 48)
    scale, zero = scales(w, 48, 8, True)
    args = {"num_bits": 8, "strategy": "channel"}
    compressed("int8-channel", "int-quantized", args, w, scale.bfloat16(), activations=True)
    args = {"num_bits": 8, "strategy": "group", "group_size": 16, "symmetric": False}
    scale, zero = scales(w, 16, 8, False)
    compressed("int8-g16-asym", "naive-quantized", args, w, scale, {"weight_zero_point": zero})
    floats = {"num_bits": 8, "type": "float"}
    one = w.abs().max().reshape(1) / 448
    compressed("fp8-tensor", "float-quantized", floats | {"strategy": "tensor"}, w, one)
    rows = w.abs().amax(1, keepdim=True) / 448
    compressed(
        "fp8-channel", "float-quantized", floats | {"strategy": "channel"}, w, rows.bfloat16()
    )
    blocks = torch.nn.functional.pad(w, (0, 0, 0, 8)).reshape(2, 16, 3, 16).abs().amax((1, 3)) / 448
    args = floats | {"strategy": "block", "block_structure": [16, 16]}
    compressed("fp8-block", "float-quantized", args, w, blocks)


def compressed_four() -> None:
    w = weight(24, 96)
    power = torch.exp2(torch.floor(torch.log2(w.reshape(24, 3, 32).abs().amax(-1))) - 2)
    four = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}
    four["scale_dtype"] = "torch.uint8"
    compressed("mxfp4", "mxfp4-pack-quantized", four, w, power)
    eight = four | {"num_bits": 8}
    compressed("mxfp8", "mxfp8-quantized", eight, w, power / 64)
    whole = (448 * 6 / w.abs().max()).reshape(1)
    small = (w.reshape(24, 6, 16).abs().amax(-1) / 6 * whole).to(torch.float8_e4m3fn).float()
    args = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
    extra = {"weight_global_scale": whole}
    compressed("nvfp4", "nvfp4-pack-quantized", args, w, small, extra)


# --- bitsandbytes ---


def all_bitsandbytes() -> None:
    import bitsandbytes as bnb

    library = f"bitsandbytes {bnb.__version__}"

    def four(name: str, kind: str, shape: tuple[int, int], **options: Any) -> None:
        w = weight(*shape)
        layer = bnb.nn.Linear4bit(shape[1], shape[0], bias=False, quant_type=kind)
        layer.weight = bnb.nn.Params4bit(w, requires_grad=False, quant_type=kind, **options)
        layer = layer.to("cpu")
        want = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        config = {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "bnb_4bit_quant_type": kind,
            "bnb_4bit_use_double_quant": options.get("compress_statistics", False),
        }
        write(f"bnb-{name}", layer.state_dict(), want, config, library)

    four("nf4", "nf4", (24, 64), compress_statistics=False)
    four("nf4-nested", "nf4", (264, 32), compress_statistics=True, blocksize=32)
    four("fp4", "fp4", (24, 64), compress_statistics=False)
    four("nf4-ragged", "nf4", (22, 41), compress_statistics=False)
    four("nf4-nested-ragged", "nf4", (22, 40), compress_statistics=True)
    four("nf4-bf16", "nf4", (24, 64), compress_statistics=False, quant_storage=torch.bfloat16)

    w = weight(24, 40)
    layer = bnb.nn.Linear8bitLt(40, 24, bias=False, has_fp16_weights=False)
    layer.weight = bnb.nn.Int8Params(w.half(), requires_grad=False, has_fp16_weights=False)
    layer = layer.to("cpu")
    parts = layer.state_dict()
    want = bnb.functional.int8_vectorwise_dequant(parts["weight"], parts["SCB"])
    config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    write("bnb-int8", parts, want, config, library)


# --- GPTQ and AWQ ---


def package(name: str, folder: Path, **values: Any) -> None:
    """A package whose modules can be imported without running its __init__."""
    module = types.ModuleType(name)
    module.__path__ = [str(folder)]
    for key, value in values.items():
        setattr(module, key, value)
    sys.modules[name] = module


def affine(
    bits: int, group: int, symmetric: bool, order: torch.Tensor | None = None
) -> tuple[torch.nn.Linear, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A Linear [64 -> 32] of representable weights, scales and zeros [out, groups], g_idx."""
    cols, rows = 64, 32
    index = torch.arange(cols) // group
    if order is not None:
        index = index[order]
    scale = (torch.rand(rows, cols // group) * 0.02 + 0.01).half().float()
    middle = 2 ** (bits - 1)
    zero = torch.full((rows, cols // group), middle, dtype=torch.float32)
    if not symmetric:
        zero = torch.randint(0, 2**bits, zero.shape).float()
        zero[3, 0] = 0  # wraps to all ones where zero points are stored one too low
    code = torch.randint(0, 2**bits, (rows, cols)).float()
    layer = torch.nn.Linear(cols, rows, bias=False)
    layer.weight.data = (code - zero[:, index]) * scale[:, index]
    return layer, scale, zero, index.int()


def all_gptq(model: Path) -> None:
    package("gptqmodel", model / "gptqmodel", DEBUG_ON=False)
    package("gptqmodel.models", model / "gptqmodel" / "models")
    package("gptqmodel.looper", model / "gptqmodel" / "looper")
    torch_linear = importlib.import_module("gptqmodel.nn_modules.qlinear.torch").TorchLinear
    convert = importlib.import_module("gptqmodel.utils.model")
    version = importlib.import_module("gptqmodel.version").__version__
    settings = importlib.import_module("gptqmodel.quantization.config")

    def one(name: str, bits: int, group: int, symmetric: bool, v1: bool, act: bool = False) -> None:
        order = torch.randperm(64) if act else None
        layer, scale, zero, index = affine(bits, group, symmetric, order)
        made = torch_linear(
            bits=bits,
            group_size=group,
            sym=symmetric,
            desc_act=act,
            in_features=64,
            out_features=32,
            register_buffers=True,
        )
        made.pack_original(layer, scale, zero, index)
        made.scales = made.scales.float()  # the decoder multiplies in their dtype
        made.post_init()
        want = made.dequantize_weight().T.float()
        torch.testing.assert_close(want, layer.weight.data, rtol=0, atol=1e-6)
        if v1:
            convert.convert_gptq_v2_to_v1_format_module(
                made, settings.QuantizeConfig(bits=bits, group_size=group)
            )
        parts = {n: getattr(made, n) for n in ("qweight", "qzeros", "g_idx")}
        config = {
            "quant_method": "gptq",
            "bits": bits,
            "group_size": group,
            "sym": symmetric,
            "desc_act": act,
            "checkpoint_format": "gptq" if v1 else "gptq_v2",
        }
        write(
            f"gptq-{name}",
            parts | {"scales": made.scales.half()},
            want,
            config,
            f"gptqmodel {version}",
        )

    one("4-v2-act", 4, 32, False, False, act=True)
    one("4-v1-sym", 4, 32, True, True)
    one("4-v1-asym", 4, 32, False, True)
    one("8-v1-sym", 8, 64, True, True)
    one("8-v2-asym", 8, 32, False, False)
    one("3-v1-asym", 3, 32, False, True)
    one("2-v1-sym", 2, 32, True, True)


def auto_gptq(auto: Path) -> None:
    spec = importlib.util.spec_from_file_location(
        "auto_gptq_linear", auto / "auto_gptq" / "nn_modules" / "qlinear" / "qlinear_cuda_old.py"
    )
    assert spec is not None
    assert spec.loader is not None
    old = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(old)
    layer, scale, zero, _ = affine(4, 32, True)
    made = old.QuantLinear(4, 32, 64, 32, bias=False, weight_dtype=torch.float32)
    made.pack(layer, scale.clone(), zero.clone(), None)
    want = made(torch.eye(64)).T
    torch.testing.assert_close(want, layer.weight.data, rtol=0, atol=1e-6)
    parts = {n: getattr(made, n) for n in ("qweight", "qzeros", "g_idx")}
    config = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True}
    write("gptq-4-auto", parts | {"scales": made.scales.half()}, want, config, "auto_gptq 0.7.1")


def all_awq(source: Path) -> None:
    for part in ("", ".modules", ".modules.linear", ".utils"):
        package(f"awq{part}", source / "awq" / part.removeprefix(".").replace(".", "/"))
    gemm = importlib.import_module("awq.modules.linear.gemm")
    unpack = importlib.import_module("awq.utils.packing_utils").dequantize_gemm
    for name, symmetric in (("4", False), ("4-even", True)):
        layer, scale, zero, _ = affine(4, 32, symmetric)
        made = gemm.WQLinear_GEMM.from_linear(
            layer, 4, 32, scales=scale.T.contiguous(), zeros=zero.T.contiguous()
        )
        want = unpack(made.qweight, made.qzeros, made.scales.float(), 4, 32).T
        torch.testing.assert_close(want, layer.weight.data, rtol=0, atol=1e-6)
        parts = {n: getattr(made, n) for n in ("qweight", "qzeros", "scales")}
        config = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}
        write(f"awq-{name}", parts, want, config, "autoawq 0.2.9")


if __name__ == "__main__":
    all_compressed()
    all_bitsandbytes()
    all_gptq(Path(sys.argv[2]))
    auto_gptq(Path(sys.argv[1]))
    all_awq(Path(sys.argv[3]))

"""ONNX files: the network by jax2onnx, with what comes before and after it written as ONNX."""

import contextlib
import logging
import pathlib
import tempfile
import warnings
from collections.abc import Iterator, Mapping

import jax2onnx
import numpy as np
import onnx
import onnx.compose
import onnx.inliner
import onnx.parser
import onnxruntime
from jaxtyping import Float32, UInt8
from onnxruntime import quantization
from onnxruntime.transformers.float16 import convert_float_to_float16

from mros_jax.data import augment, decoding
from mros_jax.export.model import Model
from mros_jax.models.layers import plainly

OPSET = 18
_IR_VERSION = 9  # of files with that opset; what is newer is not read by older runtimes
_VERSIONS = {"ir_version": _IR_VERSION, "opset": OPSET}

# Images to planes, by the order that the network takes them in.
_PLANES = {
    "rgb": "planes = Transpose <perm = [0, 3, 1, 2]> (images)",
    "bgr": """rgb = Transpose <perm = [0, 3, 1, 2]> (images)
  order = Constant <value_ints = [2, 1, 0]> ()
  planes = Gather <axis = 1> (rgb, order)""",
}

# `mros_jax.data.augment.preprocess`, with planes instead of channels, for sizes that are known when
# it runs. The weights of PIL's resize are those of `mros_jax.data.resample.make_taps` as a matrix.
_BEFORE = """
<ir_version: {ir_version}, opset_import: ["" : {opset}, "mros_jax" : 1]>
before (uint8[batch, height, width, 3] images) => (float[batch, 3, {height}, {width}] inputs)
<float[1, 3, 1, 1] mean = {{{mean}}}, float[1, 3, 1, 1] factor = {{{factor}}}>
{{
  shape = Shape (images)
  row = Constant <value_int = 1> ()
  column = Constant <value_int = 2> ()
  tall = Gather (shape, row)
  wide = Gather (shape, column)
  out_tall = Constant <value_int = {height}> ()
  out_wide = Constant <value_int = {width}> ()
  down = mros_jax.weights (tall, out_tall)
  across = mros_jax.weights (wide, out_wide)
  turned = Transpose <perm = [1, 0]> (across)
  {planes}
  exact = Cast <to = {double}> (planes)
  sums_across = MatMul (exact, turned)
  narrow = mros_jax.level (sums_across)
  sums_down = MatMul (down, narrow)
  resized = mros_jax.level (sums_down)
  levels = Cast <to = {float}> (resized)
  centered = Sub (levels, mean)
  inputs = Mul (centered, factor)
}}

<domain: "mros_jax", opset_import: ["" : {opset}]>
level (sum) => (level)
{{
  unit = Constant <value = double {{4194304}}> ()
  half = Constant <value = double {{0.5}}> ()
  black = Constant <value = double {{0}}> ()
  white = Constant <value = double {{255}}> ()
  share = Div (sum, unit)
  raised = Add (share, half)
  whole = Floor (raised)
  level = Clip (whole, black, white)
}}

<domain: "mros_jax", opset_import: ["" : {opset}]>
weights (size, out) => (weights)
{{
  zero = Constant <value = double {{0}}> ()
  half = Constant <value = double {{0.5}}> ()
  one = Constant <value = double {{1}}> ()
  unit = Constant <value = double {{4194304}}> ()
  reach = Constant <value = double {{{reach}}}> ()
  start = Constant <value_int = 0> ()
  step = Constant <value_int = 1> ()
  columns = Constant <value_ints = [1]> ()
  inputs = Cast <to = {double}> (size)
  outputs = Cast <to = {double}> (out)
  scale = Div (inputs, outputs)
  wider = Max (scale, one)
  span = Mul (reach, wider)
  places = Range (start, out, step)
  rows = Cast <to = {double}> (places)
  middles = Add (rows, half)
  centers = Mul (middles, scale)
  center = Unsqueeze (centers, columns)
  pixels = Range (start, size, step)
  x = Cast <to = {double}> (pixels)
  low = Sub (center, span)
  raised_low = Add (low, half)
  first = Floor (raised_low)
  high = Add (center, span)
  raised_high = Add (high, half)
  last = Floor (raised_high)
  from_first = GreaterOrEqual (x, first)
  before_last = Less (x, last)
  inside = And (from_first, before_last)
  middle = Add (x, half)
  away = Sub (middle, center)
  relative = Div (away, wider)
  distance = Abs (relative)
{kernel}
  kept = Where (inside, kernel, zero)
  sums = ReduceSum (kept, columns)
  shares = Div (kept, sums)
  scaled = Mul (shares, unit)
  sign = Sign (scaled)
  size_of = Abs (scaled)
  raised = Add (size_of, half)
  whole = Floor (raised)
  weights = Mul (sign, whole)
}}
"""

# Kernel and reach, as in `mros_jax.data.resample`.
_KERNELS = {
    "bilinear": (
        """
  fall = Sub (one, distance)
  kernel = Max (fall, zero)
""",
        1,
    ),
    "bicubic": (
        """
  a = Constant <value = double {-0.5}> ()
  a2 = Constant <value = double {1.5}> ()
  a3 = Constant <value = double {2.5}> ()
  two = Constant <value = double {2}> ()
  four = Constant <value = double {4}> ()
  five = Constant <value = double {5}> ()
  eight = Constant <value = double {8}> ()
  n1 = Mul (a2, distance)
  n2 = Sub (n1, a3)
  n3 = Mul (n2, distance)
  n4 = Mul (n3, distance)
  near = Add (n4, one)
  f1 = Sub (distance, five)
  f2 = Mul (f1, distance)
  f3 = Add (f2, eight)
  f4 = Mul (f3, distance)
  f5 = Sub (f4, four)
  far = Mul (f5, a)
  is_near = Less (distance, one)
  is_far = Less (distance, two)
  beyond = Where (is_far, far, zero)
  kernel = Where (is_near, near, beyond)
""",
        2,
    ),
}

_AFTER = {
    True: """
<ir_version: {ir_version}, opset_import: ["" : {opset}]>
after (float[batch, {size}] made) => (float[batch, {size}] descriptors)
{{
  columns = Constant <value_ints = [1]> ()
  norms = ReduceL2 (made, columns)
  descriptors = Div (made, norms)
}}
""",
    False: """
<ir_version: {ir_version}, opset_import: ["" : {opset}]>
after (float[batch, {size}] made) => (float[batch, {size}] descriptors)
{{
  descriptors = Identity (made)
}}
""",
}


def convert(model: Model) -> onnx.ModelProto:
    """The network alone: "planes" (batch, 3, height, width), normalized, to "made" (batch, D)."""
    height, width = model.size
    with plainly(), _quiet():
        network: onnx.ModelProto = jax2onnx.to_onnx(
            model.describe,
            [("batch", height, width, 3)],
            model_name=model.run.system,
            opset=OPSET,
            inputs_as_nchw=[0],
            input_names=["planes"],
            output_names=["made"],
        )
    _pool_planes(network)
    network.ir_version = _IR_VERSION
    return network


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the converter's notes on its own optimizations and on types that it asks for."""
    logger = logging.getLogger("onnx_ir")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Explicitly requested dtype", UserWarning)
            yield
    finally:
        logger.setLevel(before)


def _pool_planes(network: onnx.ModelProto) -> None:
    """Have windows of (1, K, K, 1) on rows and columns alone: no runtime pools over four axes."""
    nodes = []
    for node in network.graph.node:
        values = {a.name: list(a.ints) for a in node.attribute if a.ints}
        if node.op_type != "MaxPool" or len(values["kernel_shape"]) != 4:
            nodes.append(node)
            continue
        # jax2onnx puts two axes before those of (B, H, W, C).
        name = node.output[0]
        pads = values.get("pads", [0] * 8)
        make = onnx.helper.make_node
        nodes += [
            make("Squeeze", [node.input[0], f"{name}_axes"], [f"{name}_maps"]),
            make("Transpose", [f"{name}_maps"], [f"{name}_planes"], perm=[0, 3, 1, 2]),
            make(
                "MaxPool",
                [f"{name}_planes"],
                [f"{name}_pooled"],
                kernel_shape=values["kernel_shape"][1:3],
                strides=values["strides"][1:3],
                pads=pads[1:3] + pads[5:7],
            ),
            make("Transpose", [f"{name}_pooled"], [f"{name}_turned"], perm=[0, 2, 3, 1]),
            make("Unsqueeze", [f"{name}_turned", f"{name}_axes"], [name]),
        ]
        axes = onnx.numpy_helper.from_array(np.array([0, 1]), f"{name}_axes")
        network.graph.initializer.append(axes)
    del network.graph.node[:]
    network.graph.node.extend(nodes)
    del network.graph.value_info[:]


def halve(network: onnx.ModelProto) -> onnx.ModelProto:
    """The network with weights and arithmetic in float16; its input and output stay float32."""
    halved: onnx.ModelProto = convert_float_to_float16(network, keep_io_types=True)
    nodes = list(halved.graph.node)
    # The converter puts the cast of an input behind what takes it.
    nodes.sort(key=lambda node: not node.name.startswith("graph_input_cast"))
    del halved.graph.node[:]
    halved.graph.node.extend(nodes)
    return halved


def quantize(
    model: Model, network: onnx.ModelProto, images: list[UInt8[np.ndarray, "_ _ 3"]]
) -> onnx.ModelProto:
    """The network with its convolutions and products in 8 bit, weights by channel.

    Args:
        model: whose network it is.
        network: from `convert`.
        images: that ranges of activations are taken from (static quantization).
    """
    height, width = model.size

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches = iter(range(0, len(images), 8))

        def get_next(self) -> dict[str, np.ndarray] | None:
            start = next(self.batches, None)
            if start is None:
                return None
            loaded = decoding.load_images(
                images[start : start + 8],
                height=height,
                width=width,
                interpolation=model.interpolation,
            )
            inputs = augment.preprocess(loaded, height=height, width=width, **model.normalization)
            return {"planes": np.asarray(inputs).transpose(0, 3, 1, 2)}

    with tempfile.TemporaryDirectory() as directory, _quiet():
        plain, prepared, made = (pathlib.Path(directory) / f"{i}.onnx" for i in range(3))
        onnx.save(network, plain)
        quantization.quant_pre_process(plain, prepared, skip_symbolic_shape=True)
        quantization.quantize_static(prepared, made, Reader(), per_channel=True)
        return onnx.load(made)


def write_before(model: Model) -> onnx.ModelProto:
    """What comes before the network: uint8 "images" to "inputs" (batch, 3, height, width)."""
    height, width = model.size
    kernel, reach = _KERNELS[model.interpolation]
    pixels = model.normalization
    mean, factor = augment.normalization(pixels["mean"], pixels["std"])
    text = _BEFORE.format(
        **_VERSIONS,
        height=height,
        width=width,
        planes=_PLANES[pixels["channels"]],
        mean=", ".join(map(repr, mean.tolist())),
        factor=", ".join(map(repr, factor.tolist())),
        kernel=kernel.strip("\n"),
        reach=reach,
        float=onnx.TensorProto.FLOAT,
        double=onnx.TensorProto.DOUBLE,
    )
    return onnx.inliner.inline_local_functions(onnx.parser.parse_model(text))


def assemble(model: Model, network: onnx.ModelProto) -> onnx.ModelProto:
    """The whole: uint8 "images" (batch, height, width, 3) to "descriptors" (batch, D)."""
    before = write_before(model)
    size = model.embedder.descriptor_sizes["descriptor"]
    text = _AFTER[model.normalized].format(**_VERSIONS, size=size)
    after = onnx.parser.parse_model(text)
    for other, prefix in ((before, "before/"), (after, "after/")):
        names = {"rename_inputs": False, "rename_outputs": False}
        onnx.compose.add_prefix(other, prefix, inplace=True, **names)
        _take_versions(other, network)
    whole = onnx.compose.merge_models(before, network, io_map=[("inputs", "planes")])
    whole = onnx.compose.merge_models(whole, after, io_map=[("made", "made")])
    whole.producer_name = "mros_jax"
    whole.graph.name = model.run.system
    onnx.checker.check_model(whole)
    return whole


def _take_versions(other: onnx.ModelProto, network: onnx.ModelProto) -> None:
    """Have what is written here the versions of a network that a tool has made newer."""
    other.ir_version = network.ir_version
    del other.opset_import[:]
    other.opset_import.extend(network.opset_import)


def explain(whole: onnx.ModelProto, metadata: Mapping[str, str]) -> None:
    """Write metadata into a model, in place."""
    onnx.helper.set_model_props(whole, dict(metadata))


class Session:
    """A file's content as onnxruntime runs it, on the CPU."""

    def __init__(self, data: bytes):
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors
        self._session = onnxruntime.InferenceSession(
            data, options, providers=["CPUExecutionProvider"]
        )

    def __call__(self, images: UInt8[np.ndarray, "B H W 3"]) -> Float32[np.ndarray, "B D"]:
        """Descriptors of images of one size."""
        [made] = self._session.run(None, {"images": images})
        return np.asarray(made)

"""Reads a compiled program: products, kernels, collectives and copies, from XLA's optimised HLO text.

`compiled.cost_analysis()` counts the body of a loop once and does not see custom kernels. Here every instruction counts
as often as it runs: loops by their trip count.
"""

import collections
import dataclasses
import math
import re

BYTES = {"f64": 8, "f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "s64": 8, "u64": 8, "s8": 1, "u8": 1, "pred": 1}
COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
FLASH = {"__cudnn$fmhaSoftmax": "forward", "__cudnn$fmhaSoftmaxBackward": "backward"}  # cuDNN's attention
SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")
HEADER = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of HLO: its result's shapes as (dtype, dimensions), opcode, operands' names and the line itself."""

    name: str
    shapes: list[tuple[str, tuple[int, ...]]]
    opcode: str
    operands: list[str]
    line: str

    @property
    def bytes(self) -> int:
        return sum(BYTES.get(dtype, 0) * math.prod(dims) for dtype, dims in self.shapes)

    def called(self) -> list[str]:
        """The computations that it runs once."""
        if self.opcode == "conditional":
            branches = re.findall(r"(?:true|false)_computation=\S+|branch_computations=\{[^}]*\}", self.line)
            return re.findall(r"%([\w.\-]+)", " ".join(branches))
        return re.findall(r"\bcalls=%?([\w.\-]+)", self.line) or (
            re.findall(r"\bto_apply=%?([\w.\-]+)", self.line) if self.opcode == "call" else []
        )


@dataclasses.dataclass
class Report:
    """The operations of a compiled program on one device, each counted as often as it runs.

    Attributes:
      flops: of matrix products, by the dtype of their operands; flash attention is not included.
      kernels: runs of custom kernels, by target.
      collectives: (number, bytes received) by kind.
      copied_bytes: written by copies and transposes that are kernels of their own.
    """

    flops: dict[str, float] = dataclasses.field(default_factory=lambda: collections.defaultdict(float))
    kernels: dict[str, int] = dataclasses.field(default_factory=lambda: collections.defaultdict(int))
    collectives: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    copied_bytes: int = 0

    @property
    def flash(self) -> dict[str, int]:
        """Runs of flash attention, forward and backward."""
        found: dict[str, int] = collections.defaultdict(int)
        for target, count in self.kernels.items():
            if way := FLASH.get(target) or ("any" if target == "tpu_custom_call" else None):
                found[way] += count
        return dict(found)

    @property
    def collective_bytes(self) -> int:
        return sum(size for _, size in self.collectives.values())


def read(text: str) -> Report:
    """Reads the text of an optimised program (`compiled.as_text()`)."""
    computations, entry = _parse(text)
    report = Report()
    _visit(computations, entry, 1, False, report)
    return dataclasses.replace(report, flops=dict(report.flops), kernels=dict(report.kernels))


def _parse(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    """The computations by name, each its instructions by name; and the name of the entry computation."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if line.startswith("}"):
            current = None
        elif current is None and (header := HEADER.match(line)):
            current = computations.setdefault(header[1], {})
            entry = header[1] if line.startswith("ENTRY") else entry
        elif current is not None and " = " in line:
            instruction = _instruction(line)
            current[instruction.name] = instruction
    return computations, entry


def _instruction(line: str) -> Instruction:
    name, _, rest = line.strip().removeprefix("ROOT ").partition(" = ")
    end = _closing(rest) if rest.startswith("(") else rest.index(" ")
    kind, rest = rest[:end], rest[end:].lstrip()
    opcode, _, after = rest.partition("(")
    operands = re.findall(r"%([\w.\-]+)", after[: _closing("(" + after) - 1])
    shapes = [(dtype, tuple(int(n) for n in dims.split(",") if n)) for dtype, dims in SHAPE.findall(kind)]
    return Instruction(name.lstrip("%"), shapes, opcode, operands, line)


def _closing(text: str) -> int:
    """The index after the parenthesis that closes the one at the start of `text`."""
    depth = 0
    for index, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return index + 1
    return len(text)


def _visit(computations: dict[str, dict[str, Instruction]], name: str, times: int, fused: bool, report: Report) -> None:
    instructions = computations.get(name, {})
    for each in instructions.values():
        if each.opcode == "while":
            body = re.search(r"\bbody=%?([\w.\-]+)", each.line)
            if body:
                _visit(computations, body[1], times * _trips(computations, each), fused, report)
            continue
        for called in each.called():
            _visit(computations, called, times, fused or each.opcode == "fusion", report)
        _count(each, instructions, times, fused, report)


def _trips(computations: dict[str, dict[str, Instruction]], loop: Instruction) -> int:
    """How often the body of a loop runs: as XLA annotates it, or up to the constant of its condition; 1 if unknown."""
    if known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.line):
        return int(known[1])
    condition = re.search(r"\bcondition=%?([\w.\-]+)", loop.line)
    instructions = computations.get(condition[1], {}) if condition else {}
    for each in instructions.values():
        if each.opcode == "compare" and "direction=LT" in each.line and each.operands[-1] in instructions:
            limit = re.search(r"constant\((\d+)\)", instructions[each.operands[-1]].line)
            return int(limit[1]) if limit else 1
    return 1


def _count(each: Instruction, others: dict[str, Instruction], times: int, fused: bool, report: Report) -> None:
    kind = each.opcode.removesuffix("-start")
    if each.opcode in ("dot", "convolution"):
        operands = [others[name].shapes[0] for name in each.operands[:2] if name in others]
        report.flops[_widest(operands)] += times * _product_flops(each, operands)
    elif each.opcode == "custom-call":
        target = re.search(r'custom_call_target="([^"]*)"', each.line)
        report.kernels[target[1] if target else ""] += times
        if target and target[1].startswith("__cublas"):
            operands = [others[name].shapes[0] for name in each.operands[:2] if name in others]
            report.flops[_widest(operands)] += times * _product_flops(each, operands)
    elif kind in COLLECTIVES and not each.opcode.endswith("-done"):
        count, size = report.collectives.get(kind, (0, 0))
        report.collectives[kind] = count + times, size + times * _received(each)
    elif not fused and _is_copy(each):
        report.copied_bytes += times * each.bytes


def _widest(operands: list[tuple[str, tuple[int, ...]]]) -> str:
    """The dtype of the widest operand."""
    return max((dtype for dtype, _ in operands), key=lambda dtype: BYTES.get(dtype, 0), default="unknown")


def _product_flops(each: Instruction, operands: list[tuple[str, tuple[int, ...]]]) -> float:
    """2 x the elements of the result x the length of the sum for each of them."""
    result = math.prod(each.shapes[0][1])
    if len(operands) < 2:
        return 0.0
    if each.opcode == "convolution":
        return _convolution_flops(each, operands[0][1], operands[1][1])
    summed = re.search(r'lhs_contracting_dim(?:s=\{|ensions":\[)([^\]}]*)', each.line)
    axes = [int(n) for n in re.findall(r"\d+", summed[1])] if summed else []
    return 2.0 * result * math.prod(operands[0][1][axis] for axis in axes)


def _convolution_flops(each: Instruction, inputs: tuple[int, ...], kernel: tuple[int, ...]) -> float:
    """FLOPs of a convolution, as which TPUs have every product: padding is not multiplied."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", each.line)
    if labels is None:
        return 0.0
    of_input, of_kernel, of_result = labels.groups()
    result, pairs = each.shapes[0][1], 1
    for axis, name in enumerate(sorted(set(of_kernel) - set("io"))):
        size, length = kernel[of_kernel.index(name)], result[of_result.index(name)]
        low = int(_window(each.line, "pad", axis, "0_0").split("_")[0])
        stride, spread = (int(_window(each.line, key, axis, "1")) for key in ("stride", "rhs_dilate"))
        gap = int(_window(each.line, "lhs_dilate", axis, "1"))
        reach = (inputs[of_input.index(name)] - 1) * gap + 1
        starts = (place * stride - low for place in range(length))
        pairs *= sum(0 <= s + k * spread < reach and (s + k * spread) % gap == 0 for s in starts for k in range(size))
    batch, outputs = result[of_result.index("b")], result[of_result.index("f")]
    return 2.0 * batch * outputs * kernel[of_kernel.index("i")] * pairs


def _window(line: str, key: str, axis: int, default: str) -> str:
    """One axis of an attribute of a convolution's window, such as the 11_11 of pad=0_0x11_11."""
    found = re.search(rf"window=\{{[^}}]*\b{key}=([\dx_\-]+)", line)
    return found[1].split("x")[axis] if found else default


def _received(each: Instruction) -> int:
    """Bytes of a collective's result; the start of an asynchronous one returns its operands first."""
    shapes = list(each.shapes)
    if each.opcode.endswith("-start") and len(shapes) > 1:
        shapes = shapes[len(shapes) // 2 :]
    return sum(BYTES.get(dtype, 0) * math.prod(dims) for dtype, dims in shapes)


def _is_copy(each: Instruction) -> bool:
    return each.opcode in ("copy", "transpose") or (
        each.opcode == "fusion" and re.search(r"(?:^|_)(?:copy|transpose)", each.name) is not None
    )

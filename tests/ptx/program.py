"""The text of a PTX module -> its kernels, as lists of instructions."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Instruction:
    """`@guard opcode operands`: fields are the parts of the opcode, its name first."""

    guard: str | None
    negated: bool
    fields: tuple[str, ...]
    operands: tuple[str, ...]
    text: str


@dataclass(frozen=True)
class Program:
    """One kernel: parameters (type, name) in order, code, where labels point, sizes of shared arrays (0: dynamic)."""

    parameters: tuple[tuple[str, str], ...]
    code: tuple[Instruction, ...]
    labels: dict[str, int]
    shared: dict[str, int]


def split(text: str) -> list[str]:
    """Split operands at the commas outside {} and []."""
    found, depth, current = [], 0, ""
    for letter in text:
        depth += (letter in "{[") - (letter in "}]")
        if letter == "," and depth == 0:
            found.append(current.strip())
            current = ""
        else:
            current += letter
    return found + [current.strip()] if current.strip() else found


def parse(ptx: str, kernel: str | None = None) -> Program:
    """The kernel of that name in a module, or the first one."""
    ptx = re.sub(r"//[^\n]*", "", ptx)
    ptx = re.sub(r"(?m)^\s*\.(loc|file)\b[^\n]*", "", ptx)
    ptx = re.sub(r"/\*.*?\*/", "", ptx, flags=re.S)
    arrays = re.finditer(r"\.shared\s+(?:\.align\s+\d+\s+)?\.b8\s+([\w$]+)\[(\d*)\]", ptx)
    shared = {match[1]: int(match[2] or 0) for match in arrays}
    name = r"[\w$]+" if kernel is None else re.escape(kernel)
    head = re.search(rf"\.entry\s+{name}\s*\((.*?)\)\s*(?:\.\w+[^{{]*)?\{{", ptx, re.S)
    assert head is not None, f"no kernel {kernel or ''} in this module"
    body = re.sub(r"\.pragma[^;]*;", "", _with_calls_inlined(_scope(ptx, head.end()), ptx))
    body = _with_labels_apart(body)
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    for statement in re.sub(r"([\w$]+):(?!:)", r";LABEL \1;", body).split(";"):
        statement = " ".join(statement.split())
        # Braces that open or close a scope, as opposed to a vector of registers.
        while statement and (re.match(r"\{ ?(?!%)(?![\w]+ ?[,}])", statement) or statement[0] == "}"):
            statement = statement[1:].strip()
        if statement.startswith("LABEL "):
            labels[statement[6:]] = len(code)
        elif statement and not statement.startswith("."):
            guarded = re.match(r"@(!?)(%?\w+)\s+(.*)", statement)
            guard, negated, rest = (guarded[2], guarded[1] == "!", guarded[3]) if guarded else (None, False, statement)
            opcode, _, operands = rest.partition(" ")
            code.append(Instruction(guard, negated, tuple(opcode.split(".")), tuple(split(operands)), rest))
    parameter = r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)(?:\s+\.ptr[^\s,]*(?:\s+\.global)?(?:\s+\.align\s+\d+)?)?\s+([\w$]+)"
    return Program(tuple(re.findall(parameter, head[1])), tuple(code), labels, shared)


def _scope(text: str, start: int) -> str:
    """What lies behind an opening brace, to its closing one."""
    depth, end = 1, start
    while depth:
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        end += 1
    return text[start : end - 1]


def _with_labels_apart(body: str) -> str:
    """Labels of a scope within the kernel's, as inline assembly has them, under names of their own."""
    number = 0

    def renamed(scope: re.Match[str]) -> str:
        nonlocal number
        number += 1
        text = scope[0]
        for label in set(re.findall(r"\b([A-Za-z]\w*):(?!:)", text)):
            text = re.sub(rf"(?<![\w$%]){label}\b", f"{label}_in_scope_{number}", text)
        return text

    return re.sub(r"\{[^{}]*\}", renamed, body)


def _with_calls_inlined(body: str, module: str) -> str:
    """Calls of functions that return nothing, replaced by what they do: with registers and labels of their own."""
    number = 0

    def inlined(call: re.Match[str]) -> str:
        nonlocal number
        number += 1
        head = re.search(rf"\.func\s+{re.escape(call[1])}\s*\(([^()]*)\)\s*(?:\.\w+[^{{;]*)?\{{", module)
        assert head is not None, f"call of {call[1]}, which this module has not or which returns something"
        text = _scope(module, head.end())
        text = re.sub(r"%([a-z]+\d+)\b", rf"%\1_in_{number}", text)
        text = re.sub(r"(\$L\w+)", rf"\1_in_{number}", text)
        text = re.sub(r"\bret\b", f"bra $end_{number}", text)
        for formal, actual in zip(re.findall(r"[\w$]+(?=\s*(?:,|$))", head[1].strip()), call[2].split(","), strict=True):
            text = re.sub(rf"ld\.param(\.\w+\s+[^,]*),\s*\[{re.escape(formal)}\]", rf"mov\1, {actual.strip()}", text)
        return f"{text} $end_{number}:"

    body = re.sub(r"st\.param(\.\w+)\s+\[(\w+)\+0\]", r"mov\1 \2", body)
    return re.sub(r"call(?:\.uni)?\s+([\w$]+)\s*,\s*\(([^()]*)\)\s*;", inlined, body)

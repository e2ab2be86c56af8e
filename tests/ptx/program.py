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


def parse(ptx: str) -> Program:
    """The first kernel of a module."""
    ptx = re.sub(r"//[^\n]*", "", ptx)
    ptx = re.sub(r"(?m)^\s*\.(loc|file)\b[^\n]*", "", ptx)
    ptx = re.sub(r"/\*.*?\*/", "", ptx, flags=re.S)
    arrays = re.finditer(r"\.shared\s+(?:\.align\s+\d+\s+)?\.b8\s+([\w$]+)\[(\d*)\]", ptx)
    shared = {match[1]: int(match[2] or 0) for match in arrays}
    head = re.search(r"\.entry\s+[\w$]+\s*\((.*?)\)\s*(?:\.\w+[^{]*)?\{", ptx, re.S)
    assert head is not None, "no kernel in this module"
    depth, end = 1, head.end()
    while depth:
        depth += {"{": 1, "}": -1}.get(ptx[end], 0)
        end += 1
    body = re.sub(r"\.pragma[^;]*;", "", ptx[head.end() : end - 1])
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
    parameter = r"\.param\s+\.(\w+)(?:\s+\.ptr[^\s,]*(?:\s+\.global)?(?:\s+\.align\s+\d+)?)?\s+([\w$]+)"
    return Program(tuple(re.findall(parameter, head[1])), tuple(code), labels, shared)

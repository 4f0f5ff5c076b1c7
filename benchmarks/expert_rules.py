"""Where experts put the parameters of each family of models: patterns over paths, as `benchmarks.experts` reads them.

"f" splits the batch, and parameters under FSDP; "t" splits heads, hidden units, vocabulary, channels; b is both, "-"
none. A spec that starts with ">" is aligned with the last dims. The rules of transformers are in `benchmarks.experts`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["FAMILIES", "Family", "Rules"]

Rules = Mapping[str, str]
"""Pattern over a path such as `h0/attn/qkv/kernel` → spec; the first that matches counts, none means whole."""


@dataclass(frozen=True, slots=True)
class Family:
    """Rules for parameters under FSDP, tensor parallelism and both, and for what modules give under the latter two.

    A layer whose kernel is split on its outputs is followed by one that is split on its inputs (Megatron's pairs).
    """

    fsdp: Rules
    tensor: Rules
    both: Rules
    outputs: Rules


_ATTENTION: Rules = {"*qkv/kernel": "--t-", "*qkv/bias": "-t-", "*attn/out/kernel": "t--"}
_ATTENTION_BOTH: Rules = {"*qkv/kernel": "f-t-", "*qkv/bias": "-t-", "*attn/out/kernel": "t-f"}

FAMILIES: dict[str, Family] = {
    "mlp": Family(
        fsdp={"*/kernel": "f-"},
        tensor={"*dense[02468]/kernel": "-t", "*dense[02468]/bias": "t", "*dense[13579]/kernel": "t-"},
        both={"*dense[02468]/kernel": "ft", "*dense[02468]/bias": "t", "*dense[13579]/kernel": "tf"},
        outputs={"dense[02468]": "ft", "*": "f"},
    ),
    "wide_resnet": Family(
        fsdp={"*/kernel": ">f"},
        tensor={"*conv2/kernel": "---t", "*conv3/kernel": "--t-", "*bn2/*": "t", "*head/kernel": "-t"},
        both={"*conv2/kernel": "--ft", "*conv3/kernel": "--tf", "*bn2/*": "t", "*head/kernel": "ft", "*/kernel": ">f"},
        outputs={"*/conv2": "f--t", "*/bn2": "f--t", "*": "f"},
    ),
    "unet": Family(
        fsdp={"*/kernel": ">f"},
        tensor={
            **_ATTENTION, "*conv1/kernel": "---t", "*conv1/bias": "t", "*/time/kernel": "-t", "*/time/bias": "t",
            "*norm2/*": "t", "*conv2/kernel": "--t-",
        },
        both={
            **_ATTENTION_BOTH, "*conv1/kernel": "--ft", "*conv1/bias": "t", "*/time/kernel": "ft", "*/time/bias": "t",
            "*norm2/*": "t", "*conv2/kernel": "--tf", "*/kernel": ">f",
        },
        outputs={"*/conv1": "f--t", "*/time": "ft", "*/norm2": "f--t", "*/qkv": "f---t-", "*": "f"},
    ),
}  # fmt: skip

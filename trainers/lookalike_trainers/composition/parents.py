"""What each parent of a merge does to the base, whatever its method. Torch.

Everything is read as one fixed change W' - W with the parent's scale in it: products B A where the
file has them, and else deltas.
"""

from collections.abc import Mapping
from pathlib import Path

from lookalike_platform.errors import CapabilityMissing, InvalidRequest
from lookalike_registry import block_scales, spectra
from lookalike_registry.check import check_registered
from lookalike_registry.compose.low_rank import LowRank
from lookalike_registry.compose.rules import COMPOSITION
from lookalike_registry.products import Product, loaded_products, read_lora
from lookalike_registry.safetensors_header import read_header
from lookalike_registry.tensor_file import METHOD_KEY, adapter_info
from lookalike_trainers.base_parts import BaseParts
from lookalike_trainers.composition.request import ParentFile
from lookalike_trainers.methods import composition, deltas, textual_inversion
from lookalike_trainers.methods.composition import Change, Subject, under
from lookalike_trainers.methods.perfusion import PREFIX as GATE
from lookalike_trainers.methods.tokens import PREFIX as TOKENS


def read(parent: ParentFile, base: BaseParts) -> Change:
    """The parent's change of this base.

    Raises:
        CapabilityMissing: for a method whose change is not one fixed sum.
        InvalidRequest: the file is not what was registered, or does not fit this base.
    """
    from safetensors.torch import load_file

    _check(parent, base.folder)
    file, scale = parent.file, parent.scale
    header = read_header(file)
    # A merge of LoRAs has several, none of which learned a word.
    unlearned = [Subject() for _ in parent.subjects]
    if METHOD_KEY not in header.metadata:
        return _of_products(read_lora(file), scale, unlearned, base)
    tensors = {key: tensor.float() for key, tensor in load_file(file).items()}
    rows = under(TOKENS, tensors)
    match parent.method:
        case "lora":
            return _of_products(loaded_products(tensors), scale, [Subject(rows)], base)
        case "ed_lora":
            layers = int(adapter_info(header, file.name).config["layers"])
            return _of_products(loaded_products(tensors), scale, [Subject(rows, layers)], base)
        case "custom_diffusion" | "dreambooth":
            changed = under(deltas.PREFIX, tensors)
        case "diff_fit":
            changed = under(
                deltas.PREFIX, tensors | block_scales.fold(tensors, deltas.base_values(base))
            )
        case "svdiff":
            own = spectra.changed(tensors, scale, deltas.base_values(base), base.cache)
            return Change(deltas=under(deltas.PREFIX, own), subjects=[Subject(rows)])
        case "textual_inversion":
            start = adapter_info(header, file.name).config["initializer"]
            rows = under(TOKENS, textual_inversion.rows_at(base, tensors, scale, start))
            return Change(subjects=[Subject(rows)])
        case "perfusion":
            gate = {key: tensor for key, tensor in tensors.items() if key.startswith(GATE)}
            return Change(subjects=[Subject(rows, gate=gate, gate_scale=scale)])
        case _ if parent.method == COMPOSITION:
            return _scaled(composition.load(file), scale)
        case _:
            raise CapabilityMissing(f"merging adapters of {parent.method}")
    changes = {name: (delta * scale).cpu() for name, delta in changed.items()}
    return Change(deltas=changes, subjects=[Subject(rows)])


def _check(parent: ParentFile, base_folder: Path) -> None:
    """A merge would hide a damaged parent: what comes out is finite and fits all the same."""
    try:
        check_registered(parent.file, parent.digest, base_folder)
    except InvalidRequest as error:
        raise InvalidRequest(f"{parent.ref}: {error.detail}", error.fields) from error


def _of_products(
    products: Mapping[str, Product], scale: float, subjects: list[Subject], base: BaseParts
) -> Change:
    """DoRA's lengths make a product a delta, g (W + B A) - W with g = m / ||W + B A||."""
    pairs, changed = {}, {}
    dora = any(product.magnitude is not None for product in products.values())
    weights = deltas.parameters_of(base) if dora else {}
    for name, product in products.items():
        pair = LowRank(scale * product.up.float().flatten(1), product.down.float())
        if product.magnitude is None:
            pairs[name] = pair
            continue
        weight = weights[f"{name}.weight"].cpu()
        whole = weight + LowRank(product.up.float().flatten(1), product.down.float()).dense()
        gain = product.magnitude.float().flatten() / whole.flatten(1).norm(dim=1)
        gain = gain.view(-1, *(1,) * (weight.dim() - 1))
        changed[f"{name}.weight"] = scale * (gain * whole - weight)
    return Change(pairs, changed, subjects)


def _scaled(change: Change, scale: float) -> Change:
    """Rows know no scale."""
    return Change(
        {name: LowRank(scale * pair.up, pair.down) for name, pair in change.products.items()},
        {name: scale * delta for name, delta in change.deltas.items()},
        [
            Subject(one.rows, one.layers, one.gate, scale * one.gate_scale)
            for one in change.subjects
        ],
    )

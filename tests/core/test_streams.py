import copy

import pytest
import torch

import libortho
from libortho.core.streams import BaseStream, Columns, Entries, Factors, OrthoStream

BUFFERS = {
    "columns": {"support.index", "support.values"},
    "unstructured": {"support.rows", "support.columns", "support.values"},
    "tail": {"tail.down", "tail.up"},
}


def parts() -> dict[str, OrthoStream]:
    residual = torch.randn(8, 16)
    return {
        "columns": OrthoStream(Columns(torch.tensor([1, 4]), residual[:, [1, 4]].T)),
        "unstructured": OrthoStream(Entries.from_mask(residual, residual > 1, torch.float32)),
        "tail": OrthoStream(None, Factors(torch.randn(3, 16), torch.randn(8, 3))),
    }


@pytest.mark.parametrize("kind", ["columns", "unstructured", "tail"])
def test_what_is_stored_is_what_is_applied(kind):
    stream = parts()[kind]
    x, dense = torch.randn(5, 16), torch.zeros(8, 16)
    stream.add_to(dense)
    torch.testing.assert_close(stream(torch.zeros(5, 8), x, 1.0), x @ dense.T)


@pytest.mark.parametrize("kind", ["columns", "unstructured", "tail"])
def test_buffers_and_bytes(kind):
    stream = parts()[kind]
    state = stream.state_dict()
    assert set(state) == BUFFERS[kind]
    assert not list(stream.parameters())
    assert stream.nbytes == sum(t.numel() * t.element_size() for t in state.values())


@pytest.mark.parametrize("kind", ["columns", "unstructured", "tail"])
def test_values_follow_the_dtype_and_indices_do_not(kind):
    stream = parts()[kind].to(torch.bfloat16)
    for name, tensor in stream.state_dict().items():
        whole = name.rsplit(".", 1)[1] in ("index", "rows", "columns")
        assert tensor.dtype is (torch.int32 if whole else torch.bfloat16)


def test_entries_hold_the_masked_residual_exactly():
    residual = torch.randn(8, 16)
    mask = torch.rand(8, 16) < 0.3
    mask[2] = False
    part = Entries.from_mask(residual, mask, torch.float32)
    dense = torch.zeros(8, 16)
    part.add_to(dense)
    assert torch.equal(dense, residual * mask)
    assert part.rows[-1] == mask.sum() == part.values.numel()


def test_a_zero_on_the_mask_still_counts_as_an_entry():
    residual = torch.zeros(4, 4)
    part = Entries.from_mask(residual, torch.ones(4, 4, dtype=torch.bool), torch.float32)
    assert OrthoStream(part).support_size == 16


def test_sizes():
    stream = OrthoStream(parts()["columns"].support, parts()["tail"].tail)
    assert (stream.support_size, stream.tail_size) == (16, 3 * (16 + 8))
    assert (OrthoStream().support_size, OrthoStream().tail_size, OrthoStream().nbytes) == (0, 0, 0)


def test_an_empty_stream_adds_nothing():
    y = torch.randn(2, 8)
    assert torch.equal(OrthoStream()(y.clone(), torch.randn(2, 16), 1.0), y)


@pytest.mark.parametrize(("bits", "group"), [(8, -1), (8, 32), (4, 32), (4, -1)])
def test_the_base_stores_integers(bits, group):
    base = BaseStream.from_weight(torch.randn(6, 64), bits, group)
    assert base.codes.dtype is (torch.int8 if bits == 8 else torch.uint8)
    assert base.codes.numel() * 8 == 6 * 64 * bits
    assert base.scales.shape == (6, 1 if group == -1 else 64 // group)
    assert base.nbytes == base.codes.nbytes + base.scales.nbytes
    assert (base.out_features, base.in_features) == (6, 64)
    assert base.group_size == (64 if group == -1 else group)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scales_take_the_weights_dtype(dtype):
    assert BaseStream.from_weight(torch.randn(6, 64).to(dtype), 8).scales.dtype is dtype


def test_a_dense_base_is_a_copy_of_the_weight():
    weight = torch.randn(6, 64)
    base = BaseStream.from_weight(weight, None)
    expected = weight.clone()
    weight.zero_()
    base.dense().zero_()
    assert torch.equal(base.dense(), expected)
    assert (base.out_features, base.in_features, base.nbytes) == (6, 64, 6 * 64 * 4)


@pytest.mark.parametrize("bits", [8, 4])
def test_codes_survive_packing(bits):
    codes = torch.randint(-7, 8, (6, 64), dtype=torch.int8)
    base = BaseStream.from_codes(codes, torch.ones(6, 1), bits)
    assert torch.equal(base.unpacked_codes(), codes)
    assert torch.equal(base.dense(), codes.float())


@pytest.mark.parametrize("bits", [8, 4])
def test_quantising_again_changes_nothing(bits):
    base = BaseStream.from_weight(torch.randn(6, 64), bits, 32)
    again = BaseStream.from_weight(base.dense(), bits, 32)
    torch.testing.assert_close(again.dense(), base.dense(), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("columns", "bits", "group", "message"),
    [(48, 8, 32, "does not divide 48"), (64, 4, 128, "does not divide 64"), (33, 4, -1, "even number of inputs")],
)
def test_shapes_that_do_not_fit_are_refused(columns, bits, group, message):
    with pytest.raises(libortho.ConfigError, match=message):
        BaseStream.from_weight(torch.randn(4, columns), bits, group)


@pytest.mark.parametrize("change", ["load", "assign", "copy"])
def test_decoding_follows_the_codes(change):
    base = BaseStream.from_weight(torch.randn(16, 64, dtype=torch.bfloat16), 4, 32)
    other = BaseStream.from_weight(torch.randn(16, 64, dtype=torch.bfloat16), 4, 32)
    x = torch.randn(1, 64, dtype=torch.bfloat16)
    base(x)
    if change == "load":
        base.load_state_dict(other.state_dict())
    elif change == "assign":
        base.load_state_dict(other.state_dict(), assign=True)
    else:
        base = copy.deepcopy(base)
        base.codes.copy_(other.codes)
        base.scales.copy_(other.scales)
    assert torch.equal(base(x), other(x))


def test_a_base_made_in_inference_mode_decodes():
    with torch.inference_mode():
        base = BaseStream.from_weight(torch.randn(16, 64, dtype=torch.bfloat16), 4, 32)
        x = torch.randn(1, 64, dtype=torch.bfloat16)
        torch.testing.assert_close(base(x).float(), x.float() @ base.dense().T, atol=0.15, rtol=0.02)


def test_wide_values_follow_a_new_storage():
    part = Columns(torch.tensor([1]), torch.ones(1, 8, dtype=torch.bfloat16))
    x = torch.ones(1, 16, dtype=torch.bfloat16)
    part(torch.zeros(1, 8, dtype=torch.bfloat16), x, 1.0)
    part.values.data = torch.zeros(1, 8, dtype=torch.bfloat16)
    assert not part(torch.zeros(1, 8, dtype=torch.bfloat16), x, 1.0).any()

"""Masks: nothing is lost on the way from the part files, pooling forgets where, grids and tokens do not."""
import numpy as np, pytest, torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from transformers import SegformerConfig, SegformerForSemanticSegmentation, SegformerModel

from conftest import run_cells
from facegen.core import load_result, seed_all
from facegen.data.faces import PARTS, flip_faces, load_faces, prepare
from facegen.data.layouts import MASKS
from facegen.conditioning.mask_encoders import (
    MaskGrid, MaskTokens, ParsingSegFormer, PooledMask, make_segformer, mask_to_grey, one_hot, parsing_loss)
from facegen.synthetic.toyfaces import render_faces, write_toyfaces

SIZES = [(32, 16), (64, 16), (64, 32)]
TINY = dict(hidden_sizes=[8, 16], num_encoder_blocks=2, depths=[1, 1], num_attention_heads=[1, 2], sr_ratios=[2, 1],
            patch_sizes=[7, 3], strides=[4, 2], mlp_ratios=[2, 2])


@pytest.fixture(autouse=True)
def seeded():
    seed_all(0)


@pytest.fixture(scope='module')
def crowd(): return render_faces(n=16, size=64, seed=0)


def nets(size, grid): return MaskGrid(size, grid), MaskTokens(size, dim=32)


def masks(size, n=4): return render_faces(n=n, size=size, seed=3).mask


# --- from part files to channels

@pytest.mark.parametrize('size', [32, 64])
def test_packed_masks_hold_the_pixels_of_the_raw_parts(tmp_path, size):
    "Later parts lie over earlier ones, nothing else happens; no mask is empty and most classes occur"
    n, raw = 24, write_toyfaces(tmp_path/'raw', 24, size=size, seed=5)
    faces = load_faces(prepare(raw, tmp_path/'packed', size))
    mask = faces[range(n)].mask
    counts = np.zeros(len(PARTS), int)
    for i in range(n):
        left = np.ones((size, size), bool)  # from the topmost part down: what nobody has claimed yet
        for c in range(len(PARTS) - 1, 0, -1):
            file = raw/MASKS/'0'/f'{i:05d}_{PARTS[c]}.png'
            if not file.exists(): continue
            mine = (np.asarray(Image.open(file).convert('L')) > 127) & left
            counts[c] += mine.sum()
            left &= ~mine
        counts[0] += left.sum()
    assert torch.bincount(mask.flatten(), minlength=len(PARTS)).tolist() == counts.tolist()
    assert (mask > 0).flatten(1).float().mean(1).min() > .1 and (counts > 0).sum() >= 15


def test_real_masks_are_not_empty_either(real_faces, tmp_path):
    faces = load_faces(prepare(real_faces/'CelebAMask-HQ', tmp_path/'packed', 64, skip_bad=True))
    mask = faces[range(min(40, len(faces)))].mask
    known = (mask >= 0).flatten(1).any(1)
    assert known.any() and ((mask > 0).flatten(1).float().mean(1)[known] > .1).all()


def test_one_hot_sums_to_one_where_something_is_asked_and_to_zero_elsewhere():
    m = torch.randint(-1, len(PARTS), (5, 8, 8), generator=torch.Generator().manual_seed(0))
    x = one_hot(m)
    assert x.shape == (5, 19, 8, 8) and x.dtype == torch.float32
    assert torch.equal(x.sum(1), (m >= 0).float()) and torch.equal(torch.where(x.sum(1) > 0, x.argmax(1), -1), m)
    assert one_hot(torch.full((2, 4, 4), -1)).sum() == 0


def test_bad_masks_get_a_sentence():
    for bad in (torch.full((1, 4, 4), 19), torch.full((1, 4, 4), -2), torch.zeros(1, 4, 4)):
        with pytest.raises(ValueError, match='whole classes -1..18'):
            one_hot(bad)
    for net in nets(64, 16):
        with pytest.raises(ValueError, match='must be 64x64 .*32, 32'):
            net(masks(32))
    with pytest.raises(ValueError, match='16 must divide 90'):
        MaskGrid(90, 16)
    with pytest.raises(ValueError, match='cannot land'):
        MaskGrid(90, 16, weights='any/thing')
    with pytest.raises(ValueError, match='square number'):
        MaskTokens(64, 32, tokens=15)
    with pytest.raises(ValueError, match='divisible by 4'):
        MaskTokens(64, 30)


def test_grey_shows_class_numbers_and_mixes_them_at_edges(crowd):
    m = crowd.mask
    assert torch.equal(mask_to_grey(m, 64), m[:, None].expand(-1, 3, -1, -1).float())
    assert torch.equal(mask_to_grey(torch.full_like(m, -1), 32), torch.zeros(16, 3, 32, 32))
    step = torch.zeros(1, 8, 8, dtype=torch.long)
    step[..., 4:] = PARTS.index('hair')
    assert set(mask_to_grey(step, 32).unique().tolist()) > {0., 13.} and mask_to_grey(step, 32).max() == 13


# --- pooled

def test_the_frozen_encoder_stays_as_it_is_and_proj_learns(crowd):
    pool = PooledMask(out=8).train()
    before = {k: v.clone() for k, v in pool.state_dict().items()}
    opt = torch.optim.AdamW([p for p in pool.parameters() if p.requires_grad], 1e-2)
    for _ in range(3):
        opt.zero_grad()
        pool(crowd.mask).square().mean().backward()
        opt.step()
    moved = {k.split('.')[0] for k, v in pool.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == {'proj'} and all(p.grad is None for p in pool.encoder.parameters())
    assert pool.training and not any(m.training for m in pool.encoder.modules())
    assert pool(crowd.mask).shape == (16, 1, 8) and pool.features(crowd.mask).shape == (16, 256)


# --- fine-tuned on parsing faces

def test_the_loss_of_parsing_is_segformers_own(crowd):
    "And pixels that are unknown have no part in it"
    net, face = ParsingSegFormer(64).eval(), crowd
    theirs = net.net(face.image/2 + .5, labels=face.mask).loss
    assert torch.allclose(parsing_loss(net, face, None).mean(), theirs, rtol=1e-4)
    half = face._replace(mask=face.mask.clone())
    half.mask[:, 32:] = -1
    assert torch.allclose(parsing_loss(net, half, None).mean()*2, net.net(face.image/2 + .5, labels=torch.where(
        half.mask < 0, 255, half.mask)).loss, rtol=1e-4)
    assert parsing_loss(net, face._replace(mask=torch.full_like(face.mask, -1)), None).max() == 0


def test_fine_tuning_moves_the_encoder_and_freezing_it_afterwards_keeps_it(crowd, tmp_path):
    net = ParsingSegFormer(64)
    start = {k: v.clone() for k, v in net.named_parameters()}
    opt = torch.optim.SGD(net.parameters(), .1)
    for _ in range(3):
        opt.zero_grad()
        parsing_loss(net.train(), crowd, None).mean().backward()
        opt.step()
    still = [k for k, v in net.named_parameters() if not k.endswith('k_proj.bias') and torch.equal(v, start[k])]
    assert still == []
    net.eval().save_encoder(tmp_path)
    pool = PooledMask(64, 8, str(tmp_path)).train()
    opt = torch.optim.AdamW([p for p in pool.parameters() if p.requires_grad], 1e-2)
    pool(crowd.mask).square().mean().backward()
    opt.step()
    tuned = dict(net.net.segformer.named_parameters())
    assert len(tuned) > 50 and all(torch.equal(p, tuned[k]) for k, p in pool.encoder.named_parameters())
    assert not torch.allclose(pool.features(crowd.mask), PooledMask(64, 8).features(crowd.mask), atol=.01)


def test_the_head_answers_for_every_pixel_at_any_size(crowd):
    net = ParsingSegFormer(32).eval()
    for side in (32, 64):
        x = F.interpolate(crowd.image[:2], (side, side))
        assert net(x).shape == (2, 19, side, side) and net.predict(x).shape == (2, side, side)


def test_the_run_leaves_an_encoder_that_a_denoiser_can_freeze(tmp_path, monkeypatch):
    monkeypatch.setenv('FACEGEN_ROOT', str(tmp_path))
    _, names = run_cells('29_segformer', steps=3)
    out, folder = load_result('_smoke-segformer'), tmp_path/'data'/'runs'/'_smoke-segformer'/'segformer'
    assert [m['metric'] for m in out['metrics'] if m['headline']] == ['miou'] and names['model'].side == 64
    pool = PooledMask(64, 8, str(folder))
    tuned = dict(names['model'].net.segformer.named_parameters())
    assert all(torch.equal(p, tuned[k]) for k, p in pool.encoder.named_parameters())


def test_empty_masks_all_look_alike_and_unknown_counts_as_background(crowd):
    pool = PooledMask()
    f = pool.features(torch.zeros_like(crowd.mask))
    assert (f - f[:1]).abs().max() < 1e-5 and torch.equal(f, pool.features(torch.full_like(crowd.mask, -1)))
    assert pool.features(crowd.mask).std(0).mean() > .05


def evenhanded(pool):
    for m in pool.modules():
        if isinstance(m, nn.Conv2d):
            m.weight.data = (m.weight.data + m.weight.data.flip(3))/2


def distance(a, b): return ((a - b).norm(dim=1).median()/F.pdist(a).median()).item()


def test_at_the_published_size_a_mask_and_its_mirror_image_are_pooled_to_nearly_the_same(crowd):
    m, mirror, pool = crowd.mask[:8], flip_faces(crowd).mask[:8], PooledMask(512)
    near = distance(pool.features(m), pool.features(mirror))
    evenhanded(pool)
    assert near < .4 and distance(pool.features(m), pool.features(mirror)) < .75*near


def test_the_asymmetry_is_kernels_and_even_strides_and_nothing_else(crowd):
    "Without both, the pooled features of a picture and of its mirror image are the same numbers"
    pool = PooledMask(64)
    evenhanded(pool)
    odd = SegformerModel(SegformerConfig(**{**pool.encoder.config.to_dict(), 'sr_ratios': [1]*4})).eval()
    evenhanded(odd)
    with torch.no_grad():
        a, b = (odd(mask_to_grey(m, 65)).last_hidden_state.mean((2, 3)) for m in (crowd.mask, crowd.mask.flip(2)))
    assert distance(a, b) < 1e-3 and distance(pool.features(crowd.mask), pool.features(crowd.mask.flip(2))) > .3


def test_pooling_cannot_see_a_shift_by_the_stride_away_from_borders():
    "A small thing far from every border: moved by a cell of the last grid, the mean hardly changes; grown, it does"
    pool = PooledMask(512)
    m = torch.zeros(1, 512, 512, dtype=torch.long)
    m[:, 208:304, 208:272] = PARTS.index('hair')
    big = m.clone()
    big[:, 208:304, 208:336] = PARTS.index('hair')
    a, shifted, grown = (pool.features(x) for x in (m, m.roll(32, 2), big))
    assert (a - shifted).norm() < .3*(a - grown).norm()


# --- grid and tokens

@pytest.mark.parametrize('size,grid', SIZES)
def test_shapes_and_any_pixel_may_be_unknown(size, grid):
    m = masks(size)
    holes = torch.where(torch.rand(m.shape) < .5, m, -1)
    for x in (m, holes, torch.full_like(m, -1)):
        a, b = (net(x) for net in nets(size, grid))
        assert a.shape == (4, 32, grid, grid) and b.shape == (4, 16, 32) and a.isfinite().all() and b.isfinite().all()


@pytest.mark.parametrize('size,grid', SIZES)
def test_every_trainable_weight_gets_a_gradient(size, grid):
    for net in nets(size, grid):
        net(masks(size)).pow(3).mean().backward()
        trainable = {k: p for k, p in net.named_parameters() if p.requires_grad}
        still = [k for k, p in trainable.items() if p.grad is None or p.grad.abs().max() < 1e-8]
        frozen = [k for k, p in net.named_parameters() if not p.requires_grad]
        assert not still and frozen and all(k.endswith('k_proj.bias') for k in frozen)


def test_a_bias_on_the_keys_changes_nothing():
    net, m = MaskGrid(64, 16), masks(64)
    before = net(m)
    for k, p in net.named_parameters():
        if k.endswith('k_proj.bias'):
            p.data += 3
    assert torch.allclose(net(m), before, atol=1e-4)


@pytest.mark.parametrize('size,grid', SIZES)
def test_an_edit_changes_the_grid_most_where_it_is(size, grid):
    net, m, f = MaskGrid(size, grid), masks(size, 1)[0], size//grid
    spots = [(y, x) for y in range(0, grid, grid//4) for x in range(0, grid, grid//4)]
    edits = m.repeat(len(spots), 1, 1)
    for e, (y, x) in zip(edits, spots):
        e[y*f:y*f + f, x*f:x*f + f] = PARTS.index('hat' if (m[y*f:y*f + f, x*f:x*f + f] != 14).all() else 'cloth')
    with torch.no_grad():
        change = (net(edits) - net(m[None])).norm(dim=1)
    for c, (y, x) in zip(change, spots):
        assert c.max() == c[max(0, y-1):y+2, max(0, x-1):x+2].max()


def test_the_grid_moves_with_the_mask(crowd):
    "Moved by the stride of the last stage, a mask gives moved features, up to what borders do"
    net, m = MaskGrid(64, 16), torch.zeros_like(crowd.mask)
    m[:, 16:48, 16:48] = crowd.mask[:, 16:48, 16:48]  # empty rim
    with torch.no_grad():
        here, there = net(m), net(m.roll(16, 2))
    inner = lambda g: g[:, :, 2:14, 6:14]  # away from what the roll brought in from the other side
    assert (inner(there) - inner(here.roll(4, 3))).norm() < .2*(inner(there) - inner(here)).norm()


def test_two_masks_with_the_same_cells_but_other_pixels_differ():
    "Detail inside a cell reaches the features: two pixels of a cell swapped"
    net, m = MaskGrid(64, 16), torch.ones(1, 64, 64, dtype=torch.long)
    m[:, 20, 20] = 2
    other = torch.ones_like(m)
    other[:, 23, 23] = 2
    assert (net.detail(one_hot(m)) - net.detail(one_hot(other))).abs().max() > .01
    folded = F.pixel_unshuffle(one_hot(m), 4)                    # the same as folding and a 1x1 convolution
    same = F.conv2d(folded, net.detail.weight.flatten(1)[:, :, None, None], net.detail.bias)
    assert torch.allclose(same, net.detail(one_hot(m)), atol=1e-5)


@pytest.mark.parametrize('tokens', [4, 16, 64])
def test_tokens_know_their_place(tokens):
    net = MaskTokens(64, 32, tokens)
    flat = net(torch.full((1, 64, 64), 1))[0]
    assert flat.shape == (tokens, 32) and F.pdist(net.positions).min() > .1
    m = masks(64, 1)
    side = round(tokens**.5)
    e = m.clone()
    e[:, :64//side, :64//side] = PARTS.index('hat')
    change = (net(e) - net(m)).norm(dim=2)[0]
    assert change.argmax() == 0


def test_training_and_use_give_the_same_features():
    "No layer draws chance of its own: a resumed run would differ"
    for net in nets(32, 16):
        assert torch.equal(net.train()(masks(32)), net.train()(masks(32)))
        assert torch.equal(net(masks(32)), net.eval()(masks(32)))


# --- pretrained

@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    torch.manual_seed(7)
    folder = tmp_path_factory.mktemp('weights')
    net = SegformerForSemanticSegmentation(SegformerConfig(**TINY, decoder_hidden_size=8, num_labels=5))
    net.save_pretrained(folder/'whole')
    net.segformer.save_pretrained(folder/'encoder')
    return folder, net.segformer.eval()


@pytest.mark.parametrize('kind', ['whole', 'encoder'])
def test_a_pretrained_folder_is_used_as_it_is(saved, kind, crowd):
    folder, net = saved
    pool = PooledMask(64, out=4, weights=str(folder/kind))
    with torch.no_grad():
        expected = net(mask_to_grey(crowd.mask, 64)).last_hidden_state.mean((2, 3))
    assert torch.allclose(pool.features(crowd.mask), expected, atol=1e-6) and pool(crowd.mask).shape == (16, 1, 4)


@pytest.mark.parametrize('size,grid', SIZES)
def test_a_pretrained_encoder_serves_the_grid_but_for_its_first_convolution(saved, size, grid):
    folder, net = saved
    ours = MaskGrid(size, grid, weights=str(folder/'encoder'))
    a, b = ours.encoder.state_dict(), net.state_dict()
    assert [k for k in b if a[k].shape != b[k].shape] == ['stages.0.patch_embeddings.proj.weight']
    assert torch.equal(a['stages.1.patch_embeddings.proj.weight'], b['stages.1.patch_embeddings.proj.weight'])
    ours(masks(size)).pow(3).mean().backward()
    assert all(p.grad is not None for p in ours.parameters() if p.requires_grad)


def test_weights_that_are_not_there_get_one_sentence(tmp_path, saved):
    for name in (str(tmp_path/'nowhere'), 'a/b/c', './nowhere'):
        with pytest.raises(ValueError, match='no SegFormer in .*config.json') as e:
            PooledMask(weights=name)
        assert '\n' not in str(e.value)
    (tmp_path/'empty').mkdir()
    with pytest.raises(ValueError, match='no SegFormer in'):
        PooledMask(weights=str(tmp_path/'empty'))
    (tmp_path/'empty'/'config.json').write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match='holds no SegFormer'):
        PooledMask(weights=str(tmp_path/'empty'))
    with pytest.raises(ValueError, match='the hub does not give it') as e:
        PooledMask(weights='nobody/nothing')
    assert '\n' not in str(e.value)
    with pytest.raises(ValueError, match='too small'):
        make_segformer(3, 4, 4, str(saved[0]/'encoder'))


def test_the_state_dict_brings_everything_back(crowd):
    for make in (lambda: PooledMask(), lambda: MaskGrid(64, 16), lambda: MaskTokens(64, 32)):
        a, b = make().eval(), make().eval()
        assert not torch.equal(a(crowd.mask), b(crowd.mask))
        b.load_state_dict(a.state_dict())
        assert torch.equal(a(crowd.mask), b(crowd.mask))

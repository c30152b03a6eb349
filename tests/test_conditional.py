"""Who is told what: conditions, tellers, denoisers, who moves in training, and what may be cut or stopped."""
from functools import partial

import pytest
import torch
from torch import nn
from transformers import SegformerConfig

from facegen.conditional import ALTER, DENOISERS, conditional_loss, contrast, make_denoiser
from facegen.core import seed_all
from facegen.faces import Face, flip
from facegen.infonce import NCE
from facegen.loss import Draw, diffusion_loss
from facegen.noise import make_scheduler
from facegen.plan import Held, TrainConfig
from facegen.sampling import make_sampler, sample
from facegen.tellers import TELLERS, Cond, Teller
from facegen.toyfaces import draw_faces
from facegen.training import begin, train

torch.set_num_threads(1)
NOISE = make_scheduler()
ONE_TOKEN = ('uncond', 'attrs', 'published', 'described')  # a single token, repeated
DEAF = ('attn2.to_q', 'attn2.to_k', 'transformer_blocks.0.norm2.') # what only asks which of equal tokens to hear


@pytest.fixture(scope='module')
def face(): return draw_faces(n=8, size=32, seed=3)


@pytest.fixture(scope='module')
def cond(face): return Cond(face.attrs, face.mask)


def net(told, **changes): seed_all(0); return make_denoiser('smoke', told, 32, **changes)
def config(**keys): return TrainConfig(**dict(dict(steps=3, batch=8, lr=1e-3, warmup=0, weight_decay=0., ema=0., flip=False, device='cpu'), **keys))
def noisy(n=8): return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(5)), torch.full((n,), 500)
def deaf(name, told): return told in ONE_TOKEN and any(w in name for w in DEAF)


class Listener(nn.Module):
    "Writes down what a denoiser would have got, and answers nothing"
    def __init__(self): super().__init__(); self.heard, self.p = [], nn.Parameter(torch.zeros(1))
    def forward(self, x, t, cond=None): self.heard.append((x, t, cond)); return 0*x + self.p


# Conditions

def test_a_condition_slices_and_drops_like_its_rows(cond):
    assert len(cond) == 8 and len(cond[2:5]) == 3 and torch.equal(cond[torch.tensor([1, 3])].mask, cond.mask[[1, 3]])
    which = torch.arange(8) % 3 == 0
    for a in (True, False, which):
        for m in (True, False, which):
            d = cond.drop(a, m); a_, m_ = (torch.as_tensor(w).expand(8) for w in (a, m))
            assert d.attrs[a_].isnan().all() and torch.equal(d.attrs[~a_], cond.attrs[~a_])
            assert (d.mask[m_] == -1).all() and torch.equal(d.mask[~m_], cond.mask[~m_])
    assert not cond.attrs.isnan().any() and cond.mask.min() >= 0, 'dropping makes a new condition'


def test_what_is_told_wrongly_on_purpose(cond):
    assert ALTER['true'](cond) is cond and (ALTER['blank masks'](cond).mask == 0).all()
    for name, same, other in (('shuffled masks', 'attrs', 'mask'), ('shuffled attrs', 'mask', 'attrs')):
        c = ALTER[name](cond); was, now = getattr(cond, other), getattr(c, other)
        assert torch.equal(getattr(c, same), getattr(cond, same))
        assert sorted(map(hash, map(str, was.tolist()))) == sorted(map(hash, map(str, now.tolist()))), 'the same rows'
        assert all(not torch.equal(a, b) for a, b in zip(was, now)), 'and none in its own place'


# Tellers

def tell(name, **keys): seed_all(0); return Teller(**{'projected': True, **TELLERS[name], 'dim': 32, 'copies': 4, 'size': 32, 'grid': 16, 'width': 8, 'segformer': '', **keys}).eval()


@pytest.mark.parametrize('name', TELLERS)
def test_what_a_teller_hears(name, cond):
    t = tell(name); tokens, grid = t(cond)
    assert tokens.shape == (8, {'giambi-lisanti': 56, 'spatial': 40}.get(name, 4), 32)
    assert (grid is None) == (name != 'spatial') and (grid is None or grid.shape == (8, 8, 16, 16))
    far = lambda c: max((a - b).abs().max().item() for a, b in zip(t(c), (tokens, grid)) if b is not None)
    assert (far(cond.drop(True, False)) > 1e-4) == (name != 'uncond'), 'attributes'
    assert (far(cond.drop(False, True)) > 1e-4) == (name not in ('uncond', 'attrs')), 'masks'
    if name in ONE_TOKEN: assert torch.equal(tokens, tokens[:, :1].expand_as(tokens))
    part = t(cond[2:5])[0]
    assert torch.allclose(part, tokens[2:5], atol=1e-5), 'a row does not depend on the others'


@pytest.mark.parametrize('changes,words', [(dict(mask='boxes'), "not as 'tokens' and 'boxes'"), (dict(attrs='clip'), "not as 'clip'"),
                                           (dict(projected=False), "'tokens' and 'grid' have none")])
def test_a_teller_that_cannot_be_is_refused(changes, words):
    with pytest.raises(ValueError, match=words): net('spatial', **changes)


def test_the_pooled_mask_cannot_say_where_but_for_its_encoders_asymmetry(cond):
    "With kernels that equal their mirror image, and no even strides, a mask and its mirror image are told in the same words"
    pooled, spatial, twin = tell('published'), tell('spatial'), Cond(cond.attrs, cond.mask.flip(2))
    far = lambda a, b: ((a - b).norm()/a.norm()).item()
    with torch.no_grad():
        asymmetry = far(pooled(cond)[0], pooled(twin)[0])
        assert 1e-3 < asymmetry < .3*far(spatial(cond)[1], spatial(twin)[1])
        pool = pooled.mask
        pool.encoder = type(pool.encoder)(SegformerConfig(**{**pool.encoder.config.to_dict(), 'sr_ratios': [1]*4})).eval(); pool.side = 65
        for m in pool.encoder.modules():
            if isinstance(m, nn.Conv2d): m.weight.copy_((m.weight + m.weight.flip(3))/2)
        assert far(pooled(cond)[0], pooled(twin)[0]) < 1e-4
        assert far(pooled(cond)[0], pooled(Cond(cond.attrs, cond.mask.roll(1, 0)))[0]) > 1e-3, 'it does hear what is there'


# Denoisers

@pytest.mark.parametrize('told', TELLERS)
def test_dropping_everything_is_the_unconditional_branch(told, cond):
    model = net(told).eval(); x, t = noisy()
    with torch.no_grad():
        nothing = model(x, t)
        assert torch.equal(model(x, t, cond.drop()), nothing) and torch.equal(model(x, t, Cond.nothing(8, 32)), nothing)
        assert (told == 'uncond') == torch.allclose(model(x, t, cond), nothing, atol=1e-6)
        assert torch.allclose(model(x[:3], t[:3], cond[:3]), model(x, t, cond)[:3], atol=1e-5)


@pytest.mark.parametrize('row', DENOISERS)
def test_every_row_can_be_built_at_its_size_and_small_ones_answer_in_their_shape(row):
    size, small = 256 if row.startswith('lc') else 64, row.startswith(('smoke', 'laptop'))
    with torch.device('cpu' if small else 'meta'): model = make_denoiser(row, 'spatial', size)
    c = model.config; x = torch.randn(2, c.channels, size//c.shrink, size//c.shrink)
    if small: assert model.eval()(x, torch.zeros(2).long()).shape == x.shape
    else: assert model.net.config.in_channels == c.channels*c.fold**2 + c.width and model.net.config.sample_size == size//c.shrink//c.fold


def test_the_papers_networks_have_their_parameters():
    with torch.device('meta'):
        for row, n in (('lc_unet_2', 109_543_043), ('lc_unet_3_vqvae', 104_950_915)):
            model = make_denoiser(row, 'attrs', 256)
            assert sum(p.numel() for p in model.net.parameters()) == n and sum(p.numel() for p in model.teller.parameters()) == 73_848
        join = make_denoiser('lc_unet_2', 'described', 256).teller
        assert join.join.weight.shape == (256, 384) and join.mask.proj.weight.shape == (128, 256)


def test_what_does_not_fit_gets_a_sentence(cond):
    model = net('spatial'); x, t = noisy()
    for call, words in ((lambda: model(x[..., :16, :16], t, cond), r'works on \(B,3,32,32\), got \(8, 3, 16, 16\)'),
                        (lambda: model(x[:2], t[:2], cond), r'attributes must be \(2,40\), one row a face, got \(8, 40\)'),
                        (lambda: model(x, t, Cond(cond.attrs, cond.mask[:, ::2, ::2])), r'masks must be \(8,32,32\).*resize them with nearest'),
                        (lambda: make_denoiser('smoke', 'spatal', 32), "unknown way of telling 'spatal'"),
                        (lambda: make_denoiser('smoek', 'spatial', 32), "unknown denoiser 'smoek'"),
                        (lambda: net('spatial')(x, t, Cond(cond.attrs, cond.mask + 18)), 'masks hold whole classes'),
                        (lambda: make_denoiser('smoke', 'spatial', 34), 'image size 34 must be divisible by 4')):
        with pytest.raises(ValueError, match=words): call()


# Who moves

@pytest.mark.parametrize('told', TELLERS)
def test_every_trainable_parameter_is_in_one_group_gets_a_gradient_and_moves(told, face):
    "With every contrastive loss. Excepted by name: what asks which of several equal tokens to hear gets nothing, up to rounding"
    for nce in ('', *NCE):
        model, largest, cfg = net(told, looks=nce == 'image'), {}, config()
        named = {n: p for n, p in model.named_parameters() if p.requires_grad}
        start = {n: p.detach().clone() for n, p in model.named_parameters()}
        groups = [p for g in begin(model, cfg).opt.param_groups for p in g['params']]
        assert sorted(map(id, groups)) == sorted(map(id, named.values())), 'each once, and no frozen one'
        for n, p in named.items(): p.register_hook(lambda g, n=n: largest.__setitem__(n, max(largest.get(n, 0.), g.abs().max().item())))
        list(train(model, Held(face), conditional_loss(NOISE, nce=nce, drop=(.3, .3)), cfg))
        listening = {n for n in named if not deaf(n, told)}
        assert {n for n in listening if not largest.get(n, 0.) > 1e-9} == set()
        assert {n for n in named if deaf(n, told) and not largest.get(n, 0.) < 1e-9} == set()
        moved = {n for n, p in model.named_parameters() if not torch.equal(p, start[n])}
        assert listening <= moved <= set(named)


def test_published_leaves_its_two_projections_still_and_described_does_not():
    still = lambda told: {n for n, p in net(told).teller.named_parameters() if not p.requires_grad and 'encoder' not in n}
    assert still('published') == {'mask.proj.weight', 'mask.proj.bias', 'join.weight', 'join.bias'} and still('described') == set()
    with torch.no_grad():
        a, b = net('published').eval(), net('described').eval(); x, t = noisy(2)
        assert torch.equal(a(x, t), b(x, t)), 'nothing else tells the two apart'


def test_equal_tokens_give_query_and_key_no_gradient(face):
    "In the denoiser itself, next to one token an attribute"
    size = {}
    for told in ('attrs', 'spatial'):
        model = net(told); conditional_loss(NOISE)(model, face, Draw(0, 0, 8)).mean().backward()
        for part in ('to_q', 'to_k', 'to_v'):
            size[told, part] = max(p.grad.abs().max().item() for n, p in model.net.named_parameters() if f'attn2.{part}.weight' in n)
    for part in ('to_q', 'to_k'): assert size['attrs', part] < 1e-6*size['attrs', 'to_v'] and size['spatial', part] > 1e-4*size['spatial', 'to_v']


def test_the_unknown_state_is_learned_only_where_something_is_unknown(face):
    for drop in (0., .5):
        model = net('spatial'); was = model.teller.attrs.unknown.detach().clone()
        list(train(model, Held(face), conditional_loss(NOISE, drop=(drop, 0.)), config()))
        assert torch.equal(model.teller.attrs.unknown, was) == (not drop)


# Does what is told arrive where it was told?

def test_mirroring_the_mask_mirrors_what_is_drawn():
    "Some seconds of training; the drawn faces are held against the real ones behind the masks, and those mirrored"
    crowd = draw_faces(n=160, size=32, seed=0); some = lambda rows: Face(*(x[rows] for x in crowd))
    noise, test = make_scheduler(prediction='sample'), some(slice(128, None)); twin = flip(test)
    model = net('spatial', widths=(32, 32), groups=16)
    cfg = config(steps=48, batch=16, lr=4e-3, warmup=6, flip=True)
    list(train(model, Held(some(slice(128))), conditional_loss(noise, drop=(.1, .1)), cfg))
    draw = lambda mask: sample(model, make_sampler('dpm++', noise), 32, 32, 5, Cond(test.attrs, mask), seed=0)
    nearer = lambda x, a, b: ((x - a).square().mean((1, 2, 3)) < (x - b).square().mean((1, 2, 3))).float().mean().item()
    assert nearer(draw(test.mask), test.image, twin.image) > .75   # by chance 0.5; 24 of 32 by chance: 0.4 %
    assert nearer(draw(twin.mask), twin.image, test.image) > .75


# The loss

def test_dropping_is_independent_and_as_often_as_asked(face):
    "Four cells of a table, and all of the chance still that of the row without dropping"
    model, plain, one, n = Listener(), Listener(), Face(*(x[:1].expand(500, *x.shape[1:]) for x in face)), 4000
    for step in range(8): conditional_loss(NOISE, drop=(.3, .2))(model, one, Draw(0, step, 500)); conditional_loss(NOISE)(plain, one, Draw(0, step, 500))
    no_attrs = torch.cat([c.attrs.isnan().all(1) for _, _, c in model.heard]); no_mask = torch.cat([(c.mask == -1).all(2).all(1) for _, _, c in model.heard])
    share = lambda x: x.float().mean().item()
    for got, want in ((no_attrs, .3), (no_mask, .2), (no_attrs & no_mask, .06), (no_attrs & ~no_mask, .24)):
        assert abs(share(got) - want) < 4*(want*(1 - want)/n)**.5
    attrs, mask = (torch.cat([getattr(c, k) for _, _, c in model.heard]) for k in ('attrs', 'mask'))
    some = lambda gone: (gone.flatten(1).any(1) & ~gone.flatten(1).all(1))                 # as often again, a part only
    assert abs(share(some(attrs.isnan())) - .7*.3*39/41) < .03 and abs(share(some(mask == -1)) - .8*.2) < .04
    named = (~attrs.isnan()).sum(1)[some(attrs.isnan())].float()
    assert 17 < named.mean() < 23 and (named <= 4).any() and (named >= 36).any(), 'from a few names to nearly all'
    free = (mask == -1)[some(mask == -1)]
    assert torch.equal(free, free.any(2)[:, :, None] & free.any(1)[:, None, :]), 'what is freed is a rectangle'
    assert ((attrs == one.attrs[0]) | attrs.isnan()).all() and ((mask == one.mask[0]) | (mask == -1)).all()
    for (x, t, _), (y, s, c) in zip(model.heard, plain.heard): assert torch.equal(x, y) and torch.equal(t, s) and not c.attrs.isnan().any()
    for drop, kept in (((1., 0.), 'mask'), ((0., 1.), 'attrs')):
        model.heard.clear(); conditional_loss(NOISE, drop=drop)(model, one, Draw(0, 0, 500)); c = model.heard[0][2]
        assert torch.equal(getattr(c, kept), getattr(one, kept)) and (c.mask == -1).all() == (kept == 'attrs')


def test_noise_and_times_differ_between_batches_and_between_faces(face):
    "Not the same noise for each batch: a published fault"
    model = Listener(); grey = face._replace(image=torch.zeros_like(face.image))
    list(train(model, Held(grey), conditional_loss(NOISE), config(steps=6)))
    xs, ts = zip(*((x, t) for x, t, _ in model.heard))
    xs, ts = torch.cat(xs).flatten(1), torch.cat(ts)
    assert len({x.numpy().tobytes() for x in xs}) == 48 and ts.unique().numel() > 40
    like = torch.corrcoef(xs); assert (like - torch.eye(48)).abs().max() < .1, 'and not the same noise, scaled'


def test_the_terms_add_up(face, cond):
    model = net('spatial', looks=True).eval(); make = partial(conditional_loss, NOISE)
    value = lambda **keys: make(**keys)(model, face, Draw(0, 3, 8))
    plain = value(); t = Draw(0, 3, 8).randint(0, 1000, 8)
    assert torch.equal(plain, diffusion_loss(NOISE, tell=lambda f, d: cond)(model, face, Draw(0, 3, 8))) and plain.shape == (8,)
    for nce in NCE:
        extra = contrast(model, nce, cond, face.image)
        assert extra.shape == (8,) and torch.allclose(value(nce=nce, lam=.5), plain + .5*extra, atol=1e-6) and torch.equal(value(nce=nce, lam=0.), plain)
    assert torch.allclose(value(weight='p2'), plain*NOISE.alphas_cumprod.neg().add(1)[t], rtol=1e-4)
    assert torch.equal(value(alter='blank masks'), diffusion_loss(NOISE, tell=lambda f, d: Cond(f.attrs, 0*f.mask))(model, face, Draw(0, 3, 8)))


def test_a_batch_may_be_cut_unless_its_faces_are_compared_or_mixed(face):
    def end(micro, **keys):
        "The losses, then all weights"
        model = net('spatial', looks=keys.get('nce') == 'image')
        steps = list(train(model, Held(face), conditional_loss(NOISE, **keys), config(micro=micro, lr=1e-4)))
        return [*(s.loss for s in steps), torch.cat([p.detach().flatten() for p in model.parameters()])]
    for keys in (dict(drop=(.4, .3)), dict(alter='blank masks', weight='min-snr')):
        *a, whole = end(0, **keys)
        *b, cut = end(3, **keys)
        assert a == pytest.approx(b, abs=1e-5) and torch.allclose(whole, cut, atol=2e-4)
    for keys in (dict(nce='published'), dict(nce='image'), dict(alter='shuffled masks'), dict(alter='shuffled attrs')):
        with pytest.raises(ValueError, match='compares or mixes the faces of a batch, and this is a slice of 3 of 8: train with micro=0, in one process'):
            end(3, **keys)


def test_stopped_and_started_again_ends_with_the_same_bits(face, tmp_path):
    "Dropout of the attribute network, dropping, the contrastive term: all chance is named by the step"
    loss, cfg = conditional_loss(NOISE, nce='published', drop=(.3, .3), weight='p2'), config(steps=5, batch=4, save_every=2, ema=.9, flip=True)
    list(train(net('described'), Held(face), loss, cfg, tmp_path/'whole'))
    for step in train(net('described'), Held(face), loss, cfg, tmp_path/'cut'):
        if step.step == 3: break
    assert [s.step for s in train(net('described'), Held(face), loss, cfg, tmp_path/'cut')] == [3, 4, 5]
    assert (tmp_path/'whole/state.safetensors').read_bytes() == (tmp_path/'cut/state.safetensors').read_bytes()
    for other in (dict(drop=(.3, .2)), dict(nce='soft'), dict(alter='blank masks'), dict(weight='')):
        with pytest.raises(ValueError, match='loss is .* there'):
            keys = {**dict(nce='published', drop=(.3, .3), weight='p2'), **other}
            list(train(net('described'), Held(face), conditional_loss(NOISE, **keys), cfg, tmp_path/'cut'))


@pytest.mark.parametrize('keys,words', [(dict(nce='clip'), "unknown contrastive loss 'clip': it must be one of empty, published"),
                                        (dict(alter='blank'), "unknown alteration 'blank': it must be one of true, blank masks"),
                                        (dict(weight='snr'), "unknown weighting 'snr'"), (dict(drop=.1), 'two shares between 0 and 1.*not 0.1'),
                                        (dict(drop=(0., 1.5)), r'not \(0.0, 1.5\)')])
def test_unknown_words_are_refused_before_training(keys, words):
    with pytest.raises(ValueError, match=words): conditional_loss(NOISE, **keys)


def test_the_image_loss_needs_its_encoder(face):
    with pytest.raises(ValueError, match='compares attributes with faces'): conditional_loss(NOISE, nce='image')(net('spatial'), face, Draw(0, 0, 8))

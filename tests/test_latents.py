"""Autoencoders go there and back, codes live, the scale is measured, and every face is encoded once."""
import json, pickle, shutil
from dataclasses import replace
import pytest, torch
from diffusers import AutoencoderKL, AutoencoderTiny, VQModel
from torchmetrics.functional.image import peak_signal_noise_ratio
from facegen import autoencoder, latents, reconstruction
from facegen.core import generator
from facegen.faces import Face, flip, load_faces, prepare
from facegen.judges import Classifier, Parser
from facegen.loss import Draw
from facegen.plan import Held, TrainConfig
from facegen.toyfaces import draw_faces, write_toyfaces

SMALL = dict(widths=(8, 16), codes=64)
TWO = dict(block_out_channels=(8, 8), norm_num_groups=4)
DOWN, UP = ('DownEncoderBlock2D',)*2, ('UpDecoderBlock2D',)*2


def kl(): return AutoencoderKL(3, 3, DOWN, UP, latent_channels=4, **TWO).eval()
def tiny(): return AutoencoderTiny(encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1)).eval()
def plain(): return VQModel(3, 3, DOWN, UP, latent_channels=3, num_vq_embeddings=32, **TWO).eval()
def small(): return autoencoder.make_autoencoder(**SMALL).eval()


@pytest.fixture(scope='module')
def packed(tmp_path_factory):
    tmp = tmp_path_factory.mktemp('toy')
    return load_faces(prepare(write_toyfaces(tmp/'raw', 40, size=32), tmp/'packed', size=32))


@pytest.fixture(scope='module')
def crowd(): return Held(draw_faces(n=96, size=32, seed=0))


cfg = TrainConfig(steps=24, batch=4, lr=3e-3, warmup=2, ema=0., weight_decay=0., save_every=5)


# ---- there and back

@pytest.mark.parametrize('make, f, c', [(kl, 2, 4), (tiny, 2, 4), (plain, 2, 3), (small, 4, 3)], ids=['kl', 'tiny', 'plain', 'folded'])
def test_every_kind_goes_there_and_back(make, f, c):
    torch.manual_seed(0); model, x = make(), torch.rand(2, 3, 32, 32)*2 - 1
    z = autoencoder.encode(model, x); y = autoencoder.decode(model, z)
    assert autoencoder.shrink(model) == f and z.shape == (2, c, 32//f, 32//f) and z.dtype == torch.float32 and not z.requires_grad
    assert y.shape == x.shape and y.abs().max() <= 1
    assert torch.allclose(autoencoder.encode(model, x[:1]), z[:1], atol=1e-5)  # a face does not depend on its batch
    with pytest.raises(ValueError, match=f'image size 31 must be divisible by {f}'): autoencoder.encode(model, x[..., :31])


def test_latents_are_what_the_library_calls_them():
    x = torch.rand(2, 3, 16, 16)*2 - 1
    with torch.no_grad():
        model = kl(); assert torch.equal(autoencoder.encode(model, x), model.encode(x).latent_dist.mode())
        model = plain(); z = model.encode(x).latents
        assert torch.equal(autoencoder.encode(model, x), z) and torch.equal(autoencoder.decode(model, z), model.decode(z).sample.clamp(-1, 1))
        model = tiny(); assert torch.equal(autoencoder.encode(model, x), model.encode(x).latents)


def test_choosing_is_what_the_library_does_and_choosing_twice_changes_nothing():
    model = small(); z = autoencoder.encode(model, draw_faces(n=3, size=32).image)
    q, _, (_, _, theirs) = model.quantize(z)
    chosen = autoencoder.choose(model, z)
    assert torch.equal(chosen.flatten(), theirs.flatten()) and torch.allclose(autoencoder.lookup(model, chosen), q, atol=1e-6)
    assert torch.equal(autoencoder.choose(model, q), chosen)
    assert torch.allclose(autoencoder.decode(model, z), autoencoder.decode(model, q, quantise=False), atol=1e-6)


def test_the_shape_of_an_autoencoder_is_checked_and_named():
    assert [autoencoder.shrink(autoencoder.make_autoencoder((8,)*n, f)) for n, f in ((1, 1), (1, 4), (2, 4), (3, 4), (2, 8))] == [1, 4, 4, 4, 8]
    with pytest.raises(ValueError, match='4 levels shrink by 8, which does not divide 4'): autoencoder.make_autoencoder((8,)*4, 4)
    a, b, c = (autoencoder.make_autoencoder(seed=s, **SMALL).state_dict() for s in (0, 0, 1))
    assert all(torch.equal(a[k], b[k]) for k in a) and any(not torch.equal(a[k], c[k]) for k in a)


# ---- learning, and codes that live

def loss_of(model, x, **kw): return autoencoder.vq_loss(x, **kw)(model, Face(x, x, x), Draw(0, kw.pop('step', 0), len(x)))


def test_the_loss_is_one_value_a_face_and_its_codebook_terms_are_the_librarys():
    model, x = small(), draw_faces(n=4, size=32).image
    each = loss_of(model, x)
    assert each.shape == (4,) and torch.allclose(each[1:2], loss_of(model, x[1:2]), atol=1e-5)
    z = autoencoder.encode(model, x); model.quantize.legacy = False
    y = autoencoder.decode(model, z); fold = torch.nn.functional.pixel_unshuffle
    with torch.no_grad():
        q, codebook, _ = model.quantize(z); y = model.decode(q, force_not_quantize=True).sample
        error = y - fold(x, 2)
        assert torch.allclose(each.mean(), codebook + error.abs().mean() + error.square().mean(), atol=1e-5)


def test_before_its_step_the_codebook_is_not_decoded_and_afterwards_gradients_pass_through_it():
    x = draw_faces(n=4, size=32).image
    for begin in (0, 1):
        model = small(); loss_of(model, x, begin=begin, commit=0.).sum().backward()
        grads = {n: p.grad for n, p in model.named_parameters()}
        assert all(g is not None and g.isfinite().all() and g.abs().sum() > 0 for g in grads.values()), begin
    model = small(); before = loss_of(model, x, begin=1, commit=9.)
    assert torch.equal(before, loss_of(model, x, begin=1, commit=0.)) and (loss_of(model, x, commit=9.) > loss_of(model, x, commit=0.)).all()


def test_reviving_moves_the_dead_and_only_the_dead():
    model = small(); z = autoencoder.encode(model, draw_faces(n=16, size=32).image)
    old = model.quantize.embedding.weight.clone(); used = autoencoder.choose(model, z).unique()
    moved = autoencoder.revive(model, z, generator('test')); new = model.quantize.embedding.weight
    same = (new == old).all(1)
    assert moved == len(old) - len(used) and same[used].all() and int(same.sum()) == len(used)
    spots = z.movedim(1, -1).flatten(0, -2)
    assert all((spots == code).all(1).any() for code in new[~same])
    assert len(autoencoder.choose(model, z).unique()) > len(used)


def test_codes_that_are_looked_after_live(crowd):
    count = lambda m: len(autoencoder.choose(m, autoencoder.encode(m, crowd[:32].image)).unique())
    alone, kept = (autoencoder.fit_autoencoder(crowd, replace(cfg, steps=40), **SMALL, **how) for how in (dict(free=0., rounds=0), dict(free=.2, rounds=4)))
    assert count(kept) > count(alone) + 8
    assert not any(p.requires_grad for p in kept.parameters()) and not kept.training


def test_dead_codes_are_moved_once_a_step_however_it_is_sliced(monkeypatch):
    x, seen = draw_faces(n=4, size=32).image, []
    monkeypatch.setattr(autoencoder, 'revive', lambda model, z, g: seen.append(len(z)))
    loss, model = autoencoder.vq_loss(x, 0, (1, 3)), small()
    for _ in range(2):  # a loss may serve two trainings
        for step in range(4):
            for a in (0, 2): loss(model, Face(x[a:a+2], x[a:a+2], x[a:a+2]), Draw(0, step, 4, a, a+2))
    assert len(seen) == 4


def test_a_stopped_training_goes_on_to_the_same_bits_across_a_revival(crowd, tmp_path):
    class Stop(Exception): pass
    def stop_at(n):
        def each(model, s):
            if s.step == n: raise Stop
        return each
    whole = autoencoder.fit_autoencoder(crowd, cfg, **SMALL, free=.2, rounds=4)
    for n in (5, 9, 17):  # quantising begins at 4; codes are moved at 4, 6, 8, 10
        with pytest.raises(Stop): autoencoder.fit_autoencoder(crowd, cfg, tmp_path/'run', each=stop_at(n), **SMALL, free=.2, rounds=4)
    again = autoencoder.fit_autoencoder(crowd, cfg, tmp_path/'run', **SMALL, free=.2, rounds=4)
    a, b = whole.state_dict(), again.state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a) and whole.config.scaling_factor == again.config.scaling_factor
    with pytest.raises(ValueError, match='belongs to another run'):
        autoencoder.fit_autoencoder(crowd, cfg, tmp_path/'run', **SMALL, free=.4, rounds=4)


# ---- bringing one in

def test_an_autoencoder_comes_from_a_folder_whatever_its_kind(tmp_path):
    for model in (kl(), tiny(), plain(), small()):
        where = tmp_path/type(model).__name__; shutil.rmtree(where, ignore_errors=True); model.save_pretrained(where/'autoencoder')
        for args in ((where/'autoencoder',), (where, 'autoencoder')):
            got, name = latents.load_autoencoder(*map(str, args))
            x = torch.rand(1, 3, 16, 16)
            assert type(got) is type(model) and name == where.name and torch.equal(latents.encode(got, x), autoencoder.encode(model, x))
            assert not got.training and not any(p.requires_grad for p in got.parameters())


def test_nothing_given_means_fresh_weights_and_always_the_same(tmp_path):
    (a, name), (b, _) = latents.load_autoencoder(), latents.load_autoencoder()
    assert name == 'untrained' and latents.shrink(a) == 4 and all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))


def test_what_is_no_autoencoder_is_refused_with_advice(tmp_path):
    with pytest.raises(FileNotFoundError, match='31_run_autoencoder'): latents.load_autoencoder(str(tmp_path))
    (tmp_path/'config.json').write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(ValueError, match='UNet2DModel, not an autoencoder: expected one of VQModel, AutoencoderKL, AutoencoderTiny'): latents.load_autoencoder(str(tmp_path))
    for name in (str(tmp_path/'none'), 'nobody/nothing'):
        with pytest.raises(FileNotFoundError, match='pass a folder'): latents.load_autoencoder(name)


# ---- the scale

def test_the_scale_makes_latents_as_large_as_noise_and_is_saved_with_the_weights(crowd, tmp_path):
    z = torch.randn(100, 3, 4, 4)*5 + .3
    assert abs((z*latents.measure_scale(z)).std() - 1) < 1e-5 and abs(latents.measure_scale(z*7) - latents.measure_scale(z)/7) < 1e-6
    with pytest.raises(ValueError, match='collapsed'): latents.measure_scale(torch.ones(3, 3))
    assert VQModel().config.scaling_factor == .18215  # the trap
    model = autoencoder.fit_autoencoder(crowd, replace(cfg, steps=4), **SMALL); model.save_pretrained(tmp_path/'autoencoder')
    saved = latents.load_autoencoder(str(tmp_path/'autoencoder'))[0].config.scaling_factor
    assert saved == model.config.scaling_factor and abs(saved/latents.measure_scale(autoencoder.encode(model, crowd[:].image)) - 1) < .1


# ---- the cache

def build(faces, tmp_path, model=None, **kw): return latents.cache_latents(faces, model or small(), 'small', 32, tmp_path/'latents', **kw)


@pytest.fixture
def shards(monkeypatch): monkeypatch.setattr(latents, 'SHARD', 16)


def test_both_flips_are_encoded_and_come_with_their_masks(packed, tmp_path, shards):
    model = small(); got, n = build(packed, tmp_path, model), len(packed); rows = [0, 15, 16, 39]
    face, here, there = packed[rows], got[rows], got[[n + r for r in rows]]
    assert len(got) == 2*n and (got.channels, got.grid, got.size) == (3, 8, 32) and got.ids[:n] == packed.ids and len(set(got.ids)) == 2*n
    assert torch.allclose(here.image, autoencoder.encode(model, face.image)*got.scale, atol=1e-5)
    assert torch.allclose(there.image, autoencoder.encode(model, face.image.flip(-1))*got.scale, atol=1e-5)
    assert torch.equal(here.mask, face.mask) and torch.equal(there.mask, flip(face).mask) and here.mask.dtype == torch.int64
    assert torch.equal(here.attrs, face.attrs) and torch.equal(there.attrs, face.attrs)
    one, two, part = got[3], got[torch.tensor([3, 4])], got[3:5]
    assert torch.equal(one.image, two.image[0]) and torch.equal(two.image, part.image) and torch.equal(got[[]].attrs, torch.empty(0, 40))


def test_the_scale_is_measured_or_given_and_never_in_the_files(packed, tmp_path):
    got = build(packed, tmp_path); wrong = build(packed, tmp_path, scale=.18215)
    assert abs(got[:].image.std() - 1) < 1e-4 and wrong.scale == .18215 and wrong.folder == got.folder
    assert torch.allclose(wrong[:].image*got.scale/.18215, got[:].image, atol=1e-4)


def test_a_second_time_nothing_is_encoded(packed, tmp_path, monkeypatch):
    got = build(packed, tmp_path)
    def never(*a): raise AssertionError('encoded again')
    monkeypatch.setattr(latents, 'encode', never)
    assert torch.equal(build(packed, tmp_path)[:].image, got[:].image)
    with pytest.raises(AssertionError, match='encoded again'): build(packed, tmp_path, autoencoder.make_autoencoder(seed=1, **SMALL))
    with pytest.raises(AssertionError, match='encoded again'): build(packed.subset(range(39)), tmp_path)


def test_a_stopped_build_goes_on_where_it_was(packed, tmp_path, shards, monkeypatch):
    real, seen = latents.encode, []
    def dies(model, x):
        seen.append(len(x))
        if len(seen) == 3: raise KeyboardInterrupt
        return real(model, x)
    monkeypatch.setattr(latents, 'encode', dies)
    with pytest.raises(KeyboardInterrupt): build(packed, tmp_path)       # the first shard of 16 is done, the second is not
    got = build(packed, tmp_path)
    assert seen == [16, 16, 16, 16, 16, 8, 8]
    monkeypatch.setattr(latents, 'encode', real)
    assert torch.equal(got[:].image, build(packed, tmp_path/'anew')[:].image)


@pytest.mark.parametrize('hurt', [lambda b: b[:-1] + bytes([b[-1] ^ 1]), lambda b: b[:-9], lambda b: b''], ids=['a bit', 'cut off', 'empty'])
def test_a_damaged_cache_is_noticed_and_mended_by_deleting_what_is_damaged(packed, tmp_path, shards, hurt):
    got = build(packed, tmp_path); whole = got[:].image.clone()
    file = got.folder/'00001.safetensors'; data = file.read_bytes(); file.unlink(); file.write_bytes(hurt(data))
    with pytest.raises(ValueError, match='00001.safetensors is damaged .*: delete that file'): build(packed, tmp_path)
    file.unlink()
    assert torch.equal(build(packed, tmp_path)[:].image, whole)


def test_unknown_attributes_and_masks_stay_unknown(tmp_path):
    face = draw_faces(n=4, size=32)
    got = build(Held(Face(face.image, torch.full((4, 40), torch.nan), torch.full((4, 32, 32), -1))), tmp_path)
    assert got[:].attrs.isnan().all() and (got[:].mask == -1).all()


def test_the_wrong_size_and_no_faces_are_refused(packed, tmp_path):
    with pytest.raises(ValueError, match='40 faces of 32 px cannot be cached at 64 px'): latents.cache_latents(packed, small(), 'x', 64, tmp_path)
    with pytest.raises(ValueError, match='0 faces'): latents.cache_latents(packed.subset([]), small(), 'x', 32, tmp_path)


def test_a_worker_opens_the_files_itself(packed, tmp_path):
    got = build(packed, tmp_path, scale=2.); sent = pickle.dumps(got)
    assert len(sent) < 1000 and torch.equal(pickle.loads(sent)[[1, 41]].image, got[[1, 41]].image)
    assert json.loads((got.folder/'cache.json').read_text())['ids'] == packed.ids


def test_real_faces_are_cached(real_faces, tmp_path):
    faces = load_faces(prepare(real_faces/'CelebAMask-HQ', tmp_path/'packed', size=32, workers=1)).subset(range(20)); got = build(faces, tmp_path)
    assert len(got) == 2*len(faces) and abs(got[:].image.std() - 1) < 1e-3 and got[:].mask.max() <= 18


# ---- what it keeps

def test_psnr_is_the_librarys_and_the_report_orders_what_it_must(crowd):
    a, b = crowd[:4].image, crowd[4:8].image
    assert torch.allclose(reconstruction.psnr(a, b), torch.stack([peak_signal_noise_ratio(x, y, data_range=2.) for x, y in zip(a, b)]), atol=1e-4)
    model = small(); report = {m['metric']: m for m in reconstruction.autoencoder_report(model, crowd, 32)}
    assert set(report) == {'psnr', 'l1', 'codes_used', 'code_perplexity'} and all(m['n'] == len(crowd) for m in report.values())
    p, used = report['psnr'], report['codes_used']
    assert p['low'] <= p['value'] <= p['high'] and p['floor'] > p['value']  # untrained: worse than shrinking
    chosen = len(autoencoder.choose(model, autoencoder.encode(model, crowd[:].image)).unique())
    assert used['value'] == chosen/64 and 1 <= report['code_perplexity']['value'] <= chosen + 1e-6
    for make in (kl, tiny):
        report = reconstruction.autoencoder_report(make(), crowd, 32)
        assert [m['metric'] for m in report] == ['psnr', 'l1'] and all(m['ceiling'] is None for m in report)


def test_reconstructions_keep_their_attributes_and_judges_have_the_faces_as_ceiling(crowd):
    torch.manual_seed(0); judge, parser = Classifier(size=32, width=8, num_features=16).eval(), Parser(size=32, width=16).eval()
    few = Held(crowd[:24]); r = reconstruction.reconstruct(small(), few, batch=10)
    assert torch.equal(r[:].attrs, few[:].attrs) and torch.equal(r[:].mask, few[:].mask) and r.ids == few.ids
    report = reconstruction.judged_report(few, few, 32, judge, parser)  # a perfect autoencoder
    assert all(m['value'] == m['ceiling'] and m['images'] == 'reconstructions' for m in report) and {'miou', 'average_precision'} <= {m['metric'] for m in report}
    real = {(m['metric'], m.get('attribute')): m['value'] for m in report}
    report = reconstruction.judged_report(r, few, 32, judge)
    assert report and all(m['ceiling'] == real[m['metric'], m.get('attribute')] for m in report)
    assert reconstruction.judged_report(r, few, 32) == []

"""infonce: each loss against an oracle, its corners, and what it does to an embedding"""
import csv, math
import pytest
import torch
import torch.nn.functional as F

from facegen.conditioning.attributes import AttributeMLP
from facegen.synthetic.attribute_sampling import sample_attributes
from facegen.core import generator
from facegen.data.faces import ATTRIBUTES, assign_splits
from facegen.conditioning.infonce import (
    NCE, ImageEncoder, attribute_similarities, cosine_similarities, image_nce, info_nce, no_self_nce, published_nce,
    similarity_rank_correlation, soft_nce, train_embedding)

NAN = float('nan')
g = lambda *keys: generator('test_infonce', *keys)


def batch(n=16, d=256, share=.3, seed=0):
    "Random embeddings (n,d), attributes (n,40) and picture embeddings (n,d)"
    attrs = (torch.rand(n, 40, generator=g('a', seed)) < share).float()
    return torch.randn(n, d, generator=g('e', seed)), attrs, torch.randn(n, d, generator=g('i', seed))


def friends(seed=0):
    "A batch in which several rows have cosines above 0.8: four kinds of faces, each row with one bit changed"
    kinds = (torch.rand(4, 40, generator=g('kinds', seed)) < .4).float().repeat(4, 1)
    rows = torch.arange(16)
    kinds[rows, torch.randint(40, (16,), generator=g('bits', seed))] = 1.
    return kinds


def cos(a, b):
    "Cosine of two lists of numbers, in double"
    dot, la, lb = (sum(x*y for x, y in zip(p, q)) for p, q in ((a, b), (a, a), (b, b)))
    return dot/math.sqrt(la*lb) if la*lb else 0.


# -- the core

@pytest.mark.parametrize('n', [1, 2, 16])
def test_one_positive_is_cross_entropy_on_the_diagonal(n):
    logits = 5*torch.randn(n, n, generator=g(n))
    want = F.cross_entropy(logits, torch.arange(n), reduction='none')
    torch.testing.assert_close(info_nce(logits, torch.eye(n, dtype=torch.bool)), want, atol=1e-5, rtol=1e-5)


def test_the_core_is_what_its_formula_says():
    logits, p = torch.randn(6, 9, generator=g(1)), torch.rand(6, 9, generator=g(2)) < .4
    p[0], p[1] = False, True
    want = []
    for row, own in zip(logits.tolist(), p):
        share = sum(math.exp(v) for v, positive in zip(row, own) if positive)/sum(map(math.exp, row))
        want.append(-math.log(share) if own.any() else 0.)
    torch.testing.assert_close(info_nce(logits, p), torch.tensor(want), atol=1e-5, rtol=1e-5)
    assert info_nce(logits, p)[0] == 0 and info_nce(logits, p)[1].abs() < 1e-6 # no positive; nothing but positives


def test_what_does_not_take_part_does_not_matter():
    logits, p = torch.randn(6, 6, generator=g(1)), torch.rand(6, 6, generator=g(2)) < .6
    among = ~torch.eye(6, dtype=torch.bool)
    a, b = info_nce(logits, p, among), info_nce(logits + 50*torch.eye(6), p, among)
    assert torch.equal(a, b)


@pytest.mark.parametrize('name', NCE)
def test_one_signature(name):
    e, a, i = batch()
    out = NCE[name](e, a, i, temperature=.2)
    assert out.shape == (16,) and out.dtype == torch.float32 and out.isfinite().all() and (out >= 0).all()


@pytest.mark.parametrize('name', NCE)
@pytest.mark.parametrize('attrs', [
    torch.zeros(8, 40), torch.ones(8, 40), torch.full((8, 40), NAN), torch.eye(8, 40),
    torch.where(torch.eye(8, 40) > 0, NAN, 1.)])
@pytest.mark.parametrize('n', [1, 2, 8])
def test_corners_stay_finite_forwards_and_backwards(name, attrs, n):
    e = torch.randn(n, 16, generator=g(3), requires_grad=True)
    NCE[name](e, attrs[:n], torch.ones(n, 16)).sum().backward()
    assert e.grad is None or e.grad.isfinite().all()


@pytest.mark.parametrize('name', NCE)
def test_scale_of_the_embedding_and_order_of_the_batch_do_not_matter(name):
    (e, _, i), a, turn = batch(), friends(), torch.randperm(16, generator=g(4))
    one = NCE[name](e, a, i)
    torch.testing.assert_close(NCE[name](7*e, a, .1*i), one, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(NCE[name](e[turn], a[turn], i[turn]), one[turn], atol=1e-5, rtol=1e-5)


# -- as published

def by_hand(emb, attrs, temperature):
    "The paper's loss in loops and double precision"
    out = []
    for i in range(len(emb)):
        above = below = 0.
        for j in range(len(emb)):
            w = math.exp(cos(emb[i], emb[j])/temperature)
            below += w
            if cos(attrs[i], attrs[j]) >= .8 - 1e-9:
                above += w
        out.append(-math.log(max(above, 1e-8)/max(below, 1e-8)))
    return torch.tensor(out)


@pytest.mark.parametrize('temperature', [.07, .5])
@pytest.mark.parametrize('seed', range(3))
def test_published_is_what_a_loop_computes(seed, temperature):
    e, a, _ = batch(d=8, seed=seed)
    for attrs in (a, friends(seed)):
        want = by_hand(e.tolist(), attrs.tolist(), temperature)
        torch.testing.assert_close(published_nce(e, attrs, temperature=temperature), want, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize('k,m,together', [
    (25, 15, False), (25, 16, True), (25, 17, True), (40, 25, False), (40, 26, True)])
def test_a_cosine_of_0_8_is_enough_and_less_is_not(k, m, together):
    "Two faces, one with k attributes, the other with m of them: cosine sqrt(m/k)"
    a = torch.zeros(3, 40)
    a[0, :k] = 1
    a[1, :m] = 1
    a[2, 39] = 1
    equal = torch.ones(3, 8)  # all logits alike, so the loss counts positives
    assert published_nce(equal, a)[1] == pytest.approx(math.log(3/(1 + together)), abs=1e-5)
    assert no_self_nce(equal, a)[1] == pytest.approx(math.log(2) if together else 0, abs=1e-5)


def test_published_counts_unknown_as_absent():
    e, a, _ = batch()
    a[:, ::3] = NAN
    assert torch.equal(published_nce(e, a), published_nce(e, a.nan_to_num(0.)))


def test_published_is_dead_for_random_embeddings_and_ln_16_for_equal_ones():
    values = [float(published_nce(*batch(seed=s)[:2]).mean()) for s in range(20)]
    assert 1e-5 < sum(values)/20 < 1.6e-5                                      # 1.3e-5 in the public code
    far = torch.linalg.qr(torch.randn(256, 16, generator=g(5)))[0].T
    assert published_nce(far, torch.eye(16, 40)).mean() == pytest.approx(15*math.exp(-1/.07), rel=.05)
    assert published_nce(torch.ones(16, 256), torch.eye(16, 40)).mean() == pytest.approx(math.log(16), abs=1e-5)


def test_published_gives_a_row_without_attributes_32_7():
    far, a = torch.linalg.qr(torch.randn(256, 16, generator=g(5)))[0].T, torch.eye(16, 40)
    a[3] = 0
    out = published_nce(far, a)
    assert out[3] == pytest.approx(1/.07 - math.log(1e-8), abs=1e-3)
    assert out[3] == pytest.approx(32.7, abs=.01) and out[:3].max() < 2e-5


def test_published_has_no_gradient_while_others_still_learn():
    "Gradient of the embedding after random start: the pair with itself swamps the rest"
    size = {}
    for name in ('published', 'soft', 'image'):
        e, _, i = batch(seed=1)
        e.requires_grad_(True)
        NCE[name](e, friends(), i).mean().backward()
        size[name] = float(e.grad.norm())
    assert size['published'] < size['soft']/1e3 and size['published'] > 0


# -- no self-pairs

@pytest.mark.parametrize('seed', range(3))
def test_no_self_is_a_loop_that_skips_oneself(seed):
    (e, _, _), a = batch(d=8, seed=seed), friends(seed)
    want = []
    for i in range(16):
        others = [j for j in range(16) if j != i]
        w = {j: math.exp(cos(e[i].tolist(), e[j].tolist())/.07) for j in others}
        own = [j for j in others if cos(a[i].tolist(), a[j].tolist()) >= .8 - 1e-9]
        want.append(-math.log(sum(w[j] for j in own)/sum(w.values())) if own else 0.)
    assert 0 < sum(v > 0 for v in want)
    torch.testing.assert_close(no_self_nce(e, a), torch.tensor(want), atol=1e-5, rtol=1e-5)


def test_no_self_never_rewards_being_like_oneself():
    e = batch()[0].requires_grad_(True)
    out = no_self_nce(e, torch.eye(16, 40))  # no face resembles another: no positive at all
    assert torch.equal(out, torch.zeros(16))
    out.sum().backward()
    assert e.grad is None or e.grad.abs().max() == 0
    twins = torch.eye(8, 40).repeat(2, 1)    # one twin each, and embeddings that know nothing
    assert no_self_nce(e, twins).mean() > 2 > 1e-3 > published_nce(e[:8], twins[:8]).mean()


def test_a_row_alone_is_a_negative_for_the_others():
    a = torch.eye(3, 40)
    a[1] = a[0]
    e = torch.tensor([[1., 0.], [1., .1], [1., -.1]])
    far = e.clone()
    far[2] = torch.tensor([-1., 0.])
    near_loss, far_loss = no_self_nce(e, a), no_self_nce(far, a)
    assert near_loss[2] == 0 and far_loss[2] == 0 and near_loss[0] > far_loss[0]


# -- soft targets

def test_soft_is_cross_entropy_with_soft_labels():
    e, a, _ = batch()
    keep = ~torch.eye(16, dtype=torch.bool)
    drop = lambda x: x[keep].view(16, 15)/.07                                  # the table without its diagonal
    have, targets = drop(cosine_similarities(e, e)), drop(attribute_similarities(a)).softmax(1)
    want = F.cross_entropy(have, targets, reduction='none')
    torch.testing.assert_close(soft_nce(e, a), want, atol=1e-5, rtol=1e-5)
    want = -(drop(attribute_similarities(a)).softmax(1)*drop(cosine_similarities(e, e)).log_softmax(1)).sum(1)
    torch.testing.assert_close(soft_nce(e, a), want, atol=1e-5, rtol=1e-5)


def test_soft_is_least_where_embeddings_are_as_alike_as_attributes():
    a = batch()[1]
    p = (attribute_similarities(a)/.07).masked_fill(torch.eye(16, dtype=torch.bool), -1e9).softmax(1)
    best = soft_nce(a, a)
    torch.testing.assert_close(best, -(p*p.clamp(1e-30).log()).sum(1), atol=1e-4, rtol=1e-4)
    for s in range(5):
        assert (soft_nce(batch(seed=s)[0], a) > best).all()
    x = a.clone().requires_grad_(True)
    soft_nce(x, a).sum().backward()
    assert x.grad.abs().max() < 1e-4


def test_soft_becomes_no_self_when_friends_are_equal_and_strangers_orthogonal():
    e, a = batch()[0], torch.eye(8, 40).repeat(2, 1)
    torch.testing.assert_close(soft_nce(e, a), no_self_nce(e, a), atol=1e-3, rtol=1e-3)


def test_a_row_that_says_nothing_costs_nothing():
    for nothing in (0., NAN):
        e, a, _ = batch()
        a[2] = nothing
        assert soft_nce(e, a)[2] == 0 and no_self_nce(e, a)[2] == 0 and (soft_nce(e, a) > 0).sum() == 15


# -- images

def test_image_is_cross_entropy_both_ways():
    e, a, i = batch()
    logits = F.normalize(e, dim=1) @ F.normalize(i, dim=1).T/.07
    want = (F.cross_entropy(logits, torch.arange(16)) + F.cross_entropy(logits.T, torch.arange(16)))/2
    torch.testing.assert_close(image_nce(e, a, i).mean(), want, atol=1e-5, rtol=1e-5)
    assert image_nce(e, a, e).max() < 1e-3 and image_nce(e, a, e.roll(1, 0)).min() > 10


def test_image_without_images_says_what_to_pass():
    with pytest.raises(ValueError, match='ImageEncoder'):
        image_nce(*batch()[:2])


@pytest.mark.parametrize('shape', [(2, 12, 16, 16), (2, 3, 16, 16), (2, 4, 32, 32), (2, 3, 8, 8)])
def test_image_encoder_takes_latents_and_folded_faces(shape):
    net = ImageEncoder(shape[1], dim=64)
    out = net(torch.randn(shape))
    assert out.shape == (2, 64) and not torch.allclose(out[0], out[1])
    out.sin().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in net.parameters())


def test_image_learns_to_find_images():
    "Pictures that show four attributes as bright quarters: held-out attributes find their picture far above chance"
    torch.manual_seed(0)
    attrs = (torch.rand(1000, 40, generator=g(9)) < .5).float()
    def light(a):
        quarters = F.interpolate(a[:, :16].view(-1, 1, 4, 4), (16, 16))
        return quarters + .1*torch.randn(len(a), 1, 16, 16, generator=g(10))
    mlp, encoder = AttributeMLP(), ImageEncoder(1)
    opt = torch.optim.Adam([*mlp.parameters(), *encoder.parameters()], 2e-3)
    for step in range(60):
        rows = torch.randint(800, (32,), generator=g('rows', step))
        loss = image_nce(mlp(attrs[rows])[:, 0], attrs[rows], encoder(light(attrs[rows]))).mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
    mlp.eval()
    new = attrs[800:816]
    with torch.no_grad():
        found = cosine_similarities(mlp(new)[:, 0], encoder(light(new))).argmax(1)
    assert (found == torch.arange(16)).float().mean() > .4                      # chance is 1/16


# -- similarity

def test_attribute_cosines_are_cosines_and_skip_what_one_does_not_know():
    a = batch()[1]
    torch.testing.assert_close(attribute_similarities(a), cosine_similarities(a, a), atol=1e-6, rtol=1e-6)
    part = a.clone()
    part[0, :20] = NAN
    want = cosine_similarities(a[:1, 20:], a[1:, 20:])[0]
    torch.testing.assert_close(attribute_similarities(part)[0, 1:], want, atol=1e-6, rtol=1e-6)
    assert torch.equal(attribute_similarities(part), attribute_similarities(part).T)
    assert attribute_similarities(torch.full((2, 40), NAN)).abs().max() == 0


def test_half_precision_does_not_move_the_threshold():
    e, a = batch()[0], friends()
    a[1] = a[0]
    a[1, a[0].nonzero()[:3, 0]] = 0                               # one pair not far from the threshold, too
    for name in ('published', 'no-self', 'soft'):
        with torch.autocast('cpu', torch.bfloat16):
            inside = NCE[name](e, a)
        torch.testing.assert_close(inside, NCE[name](e, a), atol=1e-5, rtol=1e-5)


def test_rank_correlation_knows_order_and_chance():
    a = sample_attributes(80, seed=1)
    assert similarity_rank_correlation(a, a) == pytest.approx(1, abs=1e-3)
    turn = torch.linalg.qr(torch.randn(40, 40, generator=g(6)))[0]
    assert similarity_rank_correlation(3*a @ turn, a) > .999  # a turn changes no cosine
    assert abs(similarity_rank_correlation(torch.randn(80, 64, generator=g(7)), a)) < .15


# -- training alone

def known_attrs(folder=None):
    "Attributes to train on and of other people's faces"
    if folder is None:
        a = sample_attributes(900, seed=2)
        return a[:600], a[600:]
    with open(folder/'celeba64'/'attributes.csv') as f:
        table = list(csv.DictReader(f))
    a = torch.tensor([[float(r[n]) for n in ATTRIBUTES] for r in table])
    part = assign_splits([r['identity'] for r in table], 0)
    pick = lambda p, k: a[[i for i, q in enumerate(part) if q == p]][::k]
    return pick('train', 3), pick('test', 8)


def check_story(train, heldout):
    first, last = {}, {}
    for name in ('published', 'no-self', 'soft'):
        first[name], *_, last[name] = train_embedding(name, train, heldout, steps=200, every=50, seed=3)
    assert len({m.rank_correlation for m in first.values()}) == 1                           # all start from one MLP
    assert first['published'].loss < .05 and last['published'].loss < 1e-3 < .05 < last['no-self'].loss
    assert last['soft'].loss < first['soft'].loss
    assert last['published'].rank_correlation < first['published'].rank_correlation - .1
    assert last['soft'].rank_correlation > first['soft'].rank_correlation + .02
    assert last['published'].rank_correlation < last['no-self'].rank_correlation


def test_the_story_on_drawn_attributes():
    check_story(*known_attrs())


def test_the_story_on_real_attributes(real_faces):
    check_story(*known_attrs(real_faces))


def test_trace_is_repeatable_disturbs_nothing_and_may_be_interleaved():
    train, heldout = known_attrs()
    heldout = heldout[:60]
    run = lambda name='soft', seed=0, **kw: train_embedding(name, train, heldout, steps=6, every=3, seed=seed, **kw)
    short = lambda ms: [(m.step, m.loss, m.rank_correlation) for m in ms]
    alone, other = short(run()), short(run('published'))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    both = list(zip(run(), run('published')))
    assert torch.equal(torch.get_rng_state(), before)
    assert short(m for m, _ in both) == alone and short(m for _, m in both) == other
    assert [m[0] for m in alone] == [0, 3, 6] and short(run(seed=1)) != alone
    assert list(run())[-1].emb.shape == (60, 256)


def test_trace_refuses_clearly():
    train, heldout = known_attrs()
    with pytest.raises(ValueError, match='published, no-self, soft, image'):
        next(train_embedding('clip', train, heldout))
    with pytest.raises(ValueError, match='ImageEncoder'):
        next(train_embedding('image', train, heldout))
    images = torch.randn(len(train), 12, 8, 8, generator=g(8))
    marks = list(train_embedding('image', train, heldout[:40], images, steps=2, every=2))
    assert len(marks) == 2 and marks[0].loss > .5

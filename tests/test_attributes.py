"""attributes: names and never positions, the paper's size, the third state, and who gets a gradient"""
import csv
import pytest
import torch
from diffusers.models.attention_processor import Attention

from facegen.conditioning.attributes import AttributeMLP, AttributeTokens, from_names, repeat_token, to_names
from facegen.core import generator
from facegen.data.faces import ATTRIBUTES

NAN = float('nan')


def rows(n=6, unknown=.3):
    "Random attributes: zeros, ones and unknowns"
    u = torch.rand(n, 40, generator=generator('test_attributes'))
    return torch.where(u < unknown, NAN, (u > (1 + unknown)/2).float())


def same(a, b): return torch.equal(a.nan_to_num(-1.), b.nan_to_num(-1.))


# -- names

@pytest.mark.parametrize('name', ATTRIBUTES)
def test_a_name_reaches_its_own_column_and_no_other(name):
    for value in (0, 1):
        attrs = from_names({name: value})
        assert attrs.shape == (40,) and attrs.dtype == torch.float32
        assert attrs[ATTRIBUTES.index(name)] == value and attrs.isnan().sum() == 39


def test_the_order_of_the_names_does_not_matter():
    attributes = dict(zip(ATTRIBUTES, [i % 2 for i in range(40)]))
    assert torch.equal(from_names(attributes), from_names(dict(reversed(attributes.items()))))


def test_there_and_back():
    for row in rows():
        assert same(from_names(to_names(row)), row)
    attributes = {'Young': 0, 'Smiling': 1}
    assert to_names(from_names(attributes)) == attributes
    assert to_names(from_names({'Young': None})) == {} == to_names(from_names({}))
    assert to_names(from_names({'Young': True, 'Male': False})) == {'Young': 1, 'Male': 0}


@pytest.mark.parametrize('name,meant', [
    ('smiling', 'Smiling'), ('Smilling', 'Smiling'), ('Glasses', 'Eyeglasses'), ('Wearing Hat', 'Wearing_Hat'),
    ('Beard', 'No_Beard'), ('5_oclock_shadow', '5_o_Clock_Shadow'), ('Blonde_Hair', 'Blond_Hair')])
def test_an_unknown_name_is_an_error_that_says_what_may_be_meant(name, meant):
    with pytest.raises(ValueError, match=f"{name}.*{meant}"):
        from_names({'Male': 1, name: 1})


def test_an_unknown_name_near_to_nothing_says_where_the_names_are():
    with pytest.raises(ValueError, match='qqq.*ATTRIBUTES') as e:
        from_names({'qqq': 1})
    assert 'did you mean' not in str(e.value)
    with pytest.raises(ValueError, match='31'):
        from_names({31: 1})


@pytest.mark.parametrize('value', [-1, 2, .5, 'yes', NAN])
def test_a_value_that_is_no_answer_is_an_error(value):
    with pytest.raises(ValueError, match='Smiling.*1 for present, 0 for absent, None'):
        from_names({'Smiling': value})


def test_names_follow_the_file(real_faces):
    "A row read by name from the table comes back as what the table says, whatever the order of its columns"
    with open(real_faces/'celeba64'/'attributes.csv') as f:
        for _, row in zip(range(20), csv.DictReader(f)):
            attributes = {k: int(v) for k, v in reversed(row.items()) if k in ATTRIBUTES}
            assert len(attributes) == 40 and to_names(from_names(attributes)) == attributes
            assert from_names(attributes).tolist() == [float(row[a]) for a in ATTRIBUTES]


# -- the paper's token

def test_the_papers_size():
    mlp = AttributeMLP()
    assert sum(p.numel() for p in mlp.parameters()) == 73_848
    linear = [m for m in mlp.modules() if isinstance(m, torch.nn.Linear)]
    assert [(m.in_features, m.out_features) for m in linear] == [(40, 112), (112, 184), (184, 256)]
    assert [m.p for m in mlp.modules() if isinstance(m, torch.nn.Dropout)] == [.2, .2]


def test_the_token_is_normed_and_takes_unknown_for_absent():
    mlp, attrs = AttributeMLP(out=96).eval(), rows()
    out = mlp(attrs)
    assert out.shape == (6, 1, 96) and out.isfinite().all()
    torch.testing.assert_close(out.mean(-1), torch.zeros(6, 1), atol=1e-5, rtol=0)
    assert torch.equal(out, mlp(attrs.nan_to_num(0.)))


def test_repeated_tokens_are_equal():
    token = AttributeMLP()(rows())
    for n in (1, 4):
        assert torch.equal(repeat_token(token, n), torch.cat([token]*n, 1))
    assert repeat_token(token).shape == (6, 4, 256)


def test_each_parameter_gets_a_gradient():
    for make in (AttributeMLP, lambda: AttributeTokens(16)):
        model = make()
        model(rows(32)).sin().sum().backward()
        assert all(p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize('make', [AttributeMLP, lambda: AttributeTokens(8)])
def test_a_wrong_width_is_named(make):
    with pytest.raises(ValueError, match=r'40.*\(2, 39\)'):
        make()(torch.zeros(2, 39))
    with pytest.raises(ValueError, match='40'):
        to_names(torch.zeros(39))


# -- one token an attribute

def test_a_token_follows_its_own_attribute_and_no_other():
    torch.manual_seed(0)
    tokens, base = AttributeTokens(8), rows(1)
    for i in range(40):
        seen = []
        for state in (0., 1., NAN):
            attrs = base.clone()
            attrs[0, i] = state
            out = tokens(attrs)[0]
            seen.append(out[i])
            others = [j for j in range(40) if j != i]
            assert torch.equal(out[others], tokens(base)[0][others])
        assert not any(torch.equal(a, b) for a, b in ((seen[0], seen[1]), (seen[0], seen[2]), (seen[1], seen[2])))


def test_three_states_and_the_line_between_two():
    torch.manual_seed(0)
    tokens = AttributeTokens(8)
    absent, present, unknown = (tokens(torch.full((1, 40), v))[0] for v in (0., 1., NAN))
    assert torch.equal(absent, tokens.absent) and torch.equal(unknown, tokens.unknown)
    torch.testing.assert_close(present, tokens.present)
    torch.testing.assert_close(tokens(torch.full((1, 40), .25))[0], .75*absent + .25*present)


def test_only_the_states_that_occur_get_a_gradient():
    tokens = AttributeTokens(8)
    attrs = torch.full((1, 40), NAN)
    attrs[0, 0], attrs[0, 1] = 1., 0.
    tokens(attrs).sum().backward()
    def rows_with_gradient(p): return p.grad.abs().sum(1).nonzero().flatten().tolist()
    assert rows_with_gradient(tokens.present) == [0] and rows_with_gradient(tokens.absent) == [1]
    assert rows_with_gradient(tokens.unknown) == list(range(2, 40))


# -- attention

def gradients(condition, width):
    "Largest gradient of query, key and value of one cross-attention layer, and how much its answer varies over places"
    torch.manual_seed(1)
    layer = Attention(query_dim=32, cross_attention_dim=width, heads=4, dim_head=8).double()
    places, want = torch.randn(2, len(condition), 16, 32, generator=generator('places')).double()
    out = layer(places, encoder_hidden_states=condition.double())
    (out - want).square().sum().backward()
    largest = [float(p.weight.grad.abs().max()) for p in (layer.to_q, layer.to_k, layer.to_v)]
    return largest, float(out.detach().std(1).max())


def test_four_equal_tokens_give_query_and_key_no_gradient():
    torch.manual_seed(0)
    (q, k, v), spread = gradients(repeat_token(AttributeMLP()(rows())), 256)
    assert q < 1e-9*v and k < 1e-9*v and spread < 1e-12 and v > 0


def test_one_token_alone_gives_them_none_either():
    (q, k, v), spread = gradients(AttributeMLP()(rows()), 256)
    assert q < 1e-9*v and k < 1e-9*v and spread < 1e-12


def test_one_token_an_attribute_gives_all_three_a_gradient():
    torch.manual_seed(0)
    (q, k, v), spread = gradients(AttributeTokens(64)(rows()), 64)
    assert min(q, k, v) > 1e-3*max(q, k, v) and spread > 1e-3

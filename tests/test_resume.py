"""A run notebook that is started again goes on only with the same arguments: all are compared but those that only the
measuring after the training reads, and these cannot reach the training."""
import ast, json

import pytest
import torch
from conftest import run_cells
from torch import nn

from facegen.data.faces import Face
from facegen.study.experiments import notebook_path
from facegen.training import checkpoint, loop
from facegen.training.config import InMemoryFaces, TrainConfig

TRAINING = ['29_segformer', '30_judges', '31_autoencoder', '32_unconditional', '34_conditional', '36_stable_diffusion',
            '37_lora']
# `bootstrap_size` and `at_least` are called early, so that a wrong number is told early; they touch no training
HARMLESS = 'bootstrap_size', 'at_least', 'dict', 'len', 'min', 'max', 'print'


def code_cells(notebook):
    cells = [c for c in json.loads(notebook_path(notebook).read_text())['cells'] if c['cell_type'] == 'code']
    return [''.join(c['source']) for c in cells if 'parameters' in c['metadata'].get('tags', [])] + [
        ''.join(c['source']) for c in cells if 'parameters' not in c['metadata'].get('tags', [])]


def defaults(notebook):
    return {a.target.id: ast.literal_eval(a.value) for a in ast.parse(code_cells(notebook)[0]).body}


def trains(node):
    "Calls of `train`, of the fit_* helpers, and of names that stand for them"
    names = {'train', 'fit', 'fit_classifier', 'fit_parser', 'fit_autoencoder'}
    return [n for n in ast.walk(node) if isinstance(n, ast.Call) and getattr(n.func, 'id', '') in names]


def up_to_training(notebook):
    "Its statements up to and including the last cell that trains, the parameters left out"
    cells = [ast.parse(source) for source in code_cells(notebook)[1:]]
    last = max(i for i, c in enumerate(cells) if trains(c))
    return [statement for c in cells[:last + 1] for statement in c.body]


def only_checks(node):
    "A statement that can stop a run, show something or set the bootstrap, and leaves nothing for a training to read"
    if isinstance(node, ast.If): return not node.orelse and all(isinstance(x, ast.Raise) for x in node.body)
    if isinstance(node, ast.Assert): return True
    if not isinstance(node, ast.Expr): return False
    if isinstance(node.value, ast.JoinedStr): return True  # a sentence that a cell shows
    calls = [n.func for n in ast.walk(node.value) if isinstance(n, ast.Call)]
    return all(isinstance(f, ast.Name) and f.id in HARMLESS for f in calls)


def measuring(notebook):
    "The names in its constant MEASURING"
    found = [n.value.func.value.value.split() for n in up_to_training(notebook)
             if isinstance(n, ast.Assign) and getattr(n.targets[0], 'id', '') == 'MEASURING']
    assert len(found) == 1, f'{notebook} must say once, before it trains, what only the measuring reads'
    return found[0]


def names_read(node):
    "Names that a statement takes from outside: its own loop variables and arguments left out"
    inner = {a.arg for n in ast.walk(node) if isinstance(n, ast.arguments) for a in n.args + n.kwonlyargs}
    inner |= {x.id for n in ast.walk(node) if isinstance(n, ast.comprehension)
              for x in ast.walk(n.target) if isinstance(x, ast.Name)}
    read = {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
    return read - inner


def names_set(node):
    "Names that a statement binds, or whose attributes and items it sets"
    found = {n.name for n in ast.walk(node) if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    for n in ast.walk(node):
        if isinstance(n, (ast.Name, ast.Attribute, ast.Subscript)) and isinstance(n.ctx, ast.Store):
            while not isinstance(n, ast.Name):
                n = n.value
            found.add(n.id)
    return found


def pieces(statements):
    """Statements one by one; of a loop over `train` only what it loops over, since what a caller does between two steps
    does not matter to the training (test_training says so)"""
    for n in statements:
        if isinstance(n, ast.If) and trains(n):
            yield ast.Expr(n.test)
            yield from pieces(n.body + n.orelse)
        else:
            yield ast.Expr(n.iter) if isinstance(n, ast.For) and trains(n.iter) else n


def what_training_depends_on(statements):
    "Names in the calls that train, names in whatever sets those, and so on; a bare call may do anything, so it counts"
    parts = list(pieces(statements))
    needed, before = {x for n in parts for call in trains(n) for x in names_read(call)}, None
    while needed != before:
        before = set(needed)
        for n in parts:
            acts = isinstance(n, ast.Expr) and not only_checks(n)
            if acts or names_set(n) & needed:
                needed |= names_read(n)
    return needed


def test_these_are_all_the_notebooks_that_train():
    every = sorted(p.stem for p in notebook_path('30_judges').parent.glob('*.ipynb'))
    assert [n for n in every if any(trains(ast.parse(c)) for c in code_cells(n))] == TRAINING


@pytest.mark.parametrize('notebook', TRAINING)
def test_what_is_left_out_of_the_comparison_cannot_reach_the_training(notebook):
    left_out = set(measuring(notebook))
    assert left_out and left_out <= defaults(notebook).keys()
    needed = what_training_depends_on(up_to_training(notebook))
    assert {'arguments', 'cfg', 'seed', 'faces', 'batch', 'lr', 'precision'} <= needed
    assert needed & left_out == set()


@pytest.mark.parametrize('code,reaches', [
    ('', False), ('if samples > 3: raise ValueError(samples)', False), ('bootstrap_size(samples)', False),
    ('dict(n=min(samples, 3))', False), ("f'{x[:samples].mean()}'", False), ('n = samples', False),
    ('def draw(model): return sample(model, samples)', False),
    ('loss = make_loss(samples)', True), ('k = samples\nloss = make_loss(k)', True), ('loss.weight = samples', True),
    ('loss.config["n"] = samples', True), ('set_everything(samples)', True), ('loss.update(samples)', True),
    ('def loss(model): return samples', True), ('if samples: cfg = 1', True),
    ('for i in range(samples): loss = i', True)])
def test_an_argument_that_reaches_the_training_is_found(code, reaches):
    after = 'for s in train(model, faces, loss, cfg, folder, arguments):\n    show(samples)'
    statements = ast.parse(f'loss, cfg = 1, 2\n{code}\n{after}').body
    assert ('samples' in what_training_depends_on(statements)) == reaches


@pytest.mark.parametrize('notebook', TRAINING)
def test_a_run_passes_all_its_other_arguments_to_the_training(notebook):
    "`given` is every argument; `arguments` is `given` without MEASURING; every training gets them"
    code = {ast.unparse(n) for n in up_to_training(notebook)}
    assert f"given = run_params('{notebook}', globals())" in code
    assert 'arguments = {k: v for k, v in given.items() if k not in MEASURING}' in code
    touched = [ast.unparse(n) for n in up_to_training(notebook) if {'given', 'arguments'} & names_read(n)]
    assert not any('.pop(' in x or x.startswith('del ') for x in touched)
    calls = [c for n in up_to_training(notebook) for c in trains(n)]
    helpers = [c for c in calls if c.func.id == 'fit' and notebook == '36_stable_diffusion'] # its own, around `train`
    assert calls and all('arguments' in names_read(c) for c in calls if c not in helpers)


@pytest.mark.parametrize('notebook', TRAINING)
def test_every_argument_that_changes_is_refused_by_its_name(notebook, tmp_path):
    "One after the other, by the comparison that a restart makes"
    given = {k: v for k, v in defaults(notebook).items() if k != 'run' and k not in measuring(notebook)}
    run, faces = loop.setup(nn.Linear(2, 2), TrainConfig(device='cpu')), InMemoryFaces(Face(*torch.zeros(3, 2, 2)))
    old = checkpoint.describe(run, faces, None, given)
    checkpoint.refuse_other_run(tmp_path, old, checkpoint.describe(run, faces, None, dict(given)))
    for name, value in given.items():
        other = not value if isinstance(value, bool) else value + 1 if isinstance(value, (int, float)) else value + 'x'
        new = checkpoint.describe(run, faces, None, given | {name: other})
        with pytest.raises(ValueError, match='belongs to another run: ') as e:
            checkpoint.refuse_other_run(tmp_path, old, new)
        assert f'run: {name} is {value if value != "" else "empty"} there and {other} here. Give' in str(e.value)


LORA = dict(steps=2, batch=2, n_faces=60, n_train=4, samples=4, guidance_val_size=4, sampling_steps=2, previews=0,
            guidance_scales='1')


def test_a_run_started_again_with_another_argument_is_refused(tmp_path, monkeypatch):
    "True restarts of two notebooks, whose networks and faces look alike whatever these arguments say"
    monkeypatch.setenv('FACEGEN_ROOT', str(tmp_path))
    run_cells('37_lora', **LORA)
    before = (tmp_path/'data/runs/_smoke-lora/state.safetensors').read_bytes()
    for name, old, new in (('alpha', 12., 4.), ('dropout', .15, 0.), ('caption_scheme', 'published', 'absent'),
                           ('cond_dropout', 0., .5), ('faces', 'toy-ink', 'toy')):
        with pytest.raises(ValueError, match=f'another run: {name} is {old} there and {new} here'):
            run_cells('37_lora', **LORA | {name: new})
    assert (tmp_path/'data/runs/_smoke-lora/state.safetensors').read_bytes() == before
    tiny = dict(steps=2, batch=2, n_faces=40, samples=4, sampling_steps=2)
    run_cells('34_conditional', **tiny)
    with pytest.raises(ValueError, match='another run: faces is toy there and toy-ink here'):
        run_cells('34_conditional', **tiny | dict(faces='toy-ink'))
    run_cells('34_conditional', **tiny | dict(samples=5)) # the training is done: this only measures anew

# The study as a graph: faces -> judges -> generators -> figures. Experiments, scales and names: `facegen.study.experiments`.
#   snakemake -c2 --config scale=laptop seeds=3 -- study   (`make study` does this, and shows one line a run)
#   snakemake --profile profiles/slurm --config scale=gpu seeds=3 -- study
# `make demo` calls rule `demo` in a folder of its own, `FACEGEN_OUT`; faces and committed weights are shared.
from functools import lru_cache

from facegen.core import root
from facegen.data.layouts import folder_digest
from facegen.study._warm_kernels import warm
from facegen.study.commands import main
from facegen.study.experiments import (DEMO, DEMO_FIGURE, FIGURES, default_params, fingerprint, job, run_names,
                                       with_needs)
from facegen.study.runner import figure_name, pack_path

SCALE = config.get('scale', 'laptop')
SEEDS = int(config.get('seeds', 1))
SHORT = bool(int(config.get('demo', 0)))
RUNS = config.get('runs', '').split()  # runs of `facegen launch` and of a study on other faces
STUDY = [] if RUNS else run_names(SCALE, SEEDS)
SHOWN = run_names(SCALE, SEEDS, DEMO)
PICTURES = [f'figures/{figure_name(FIGURES[f], SCALE)}.png' for f in ([DEMO_FIGURE] if SHORT else FIGURES)]
PACKS = root()/'data'/'faces'

def faces(run):
    "The packed faces that a run starts from, if it needs any"
    p = {**default_params(job(run)['notebook']), **job(run)['params']}
    if 'faces' not in p: return []
    sizes = {p['size'], max(64, p['size'])} if p.get('mask_parser') else {p['size']}  # a mask parser works at 64 px
    return [(p['faces'], p['n_faces'], size) for size in sorted(sizes)]

digest_once = lru_cache(folder_digest)

def folder(packed):
    "What rule `faces` makes"
    return str(pack_path(*packed, digest_once)/'faces.json')

PACKED = {packed: folder(packed) for run in {*STUDY, *SHOWN, *with_needs(RUNS)} for packed in faces(run)}
BY_PATH = {path: packed for packed, path in PACKED.items()}

def done(runs):
    "What rule `experiment` makes; results are in git, so the stamp says whether a run was done here"
    return [f for run in runs for f in (f'data/results/{run}.json', f'data/runs/{run}/done')]

def is_kept(run):
    "Whether a demonstration may start from committed weights"
    return SHORT and (root()/'data'/'weights'/run).is_dir()

def needs(w):
    return [*(PACKED[f] for f in faces(w.run)), *done(n for n in job(w.run)['needs'] if not is_kept(n))]

localrules: demo, study, runs

rule demo:
    input: done(SHOWN), PICTURES

rule study:
    input: done(STUDY), PICTURES

rule runs:
    input: done(RUNS)

rule faces:
    output: f'{PACKS}/{{pack}}/faces.json'
    params: what=lambda w, output: [*map(str, BY_PATH[str(output)])]
    threads: 2
    run: warm(main, ['pack', *params.what])

rule experiment:
    input: needs
    output: 'data/results/{run}.json', touch('data/runs/{run}/done')
    log: notebook='data/runs/{run}/{run}.ipynb'
    params: fingerprint=lambda w: fingerprint(w.run)
    threads: 1
    run: warm(main, ['launch', wildcards.run])

rule figure:
    input: done(SHOWN if SHORT else STUDY)
    output: 'figures/{name}.png'
    params: notebook=lambda w: next(k for k, v in FIGURES.items() if figure_name(v, SCALE) == w.name)
    run: warm(main, ['draw', params.notebook, SCALE])

# The study as a graph: faces -> judges -> generators -> figures. Rows, scales and names live in `facegen.rows`.
#   snakemake -c2 --config scale=laptop seeds=3 -- study
#   snakemake -c3 --config scale=laptop demo=1 -- demo     (judges from data/weights)
#   snakemake --profile profiles/slurm --config scale=gpu seeds=3 -- study
import os
from facegen.rows import DEMO, FIGURES, default_params, fingerprint, job, names
from facegen.kernels import warm
from facegen.study import drawable, figure_name, main, pack_path

SCALE, SEEDS, SHORT = config.get('scale', 'laptop'), int(config.get('seeds', 1)), bool(int(config.get('demo', 0)))
STUDY, SHOWN = names(SCALE, SEEDS), names(SCALE, SEEDS, DEMO)
PICTURES = [f'figures/{figure_name(FIGURES[f], SCALE)}.png' for f in (drawable(SCALE, DEMO) if SHORT else FIGURES)]

def faces(run):
    "The packed faces that a run starts from, if it needs any"
    p = {**default_params(job(run)['notebook']), **job(run)['params']}
    if 'faces' not in p: return []
    sizes = {p['size'], *([max(64, p['size'])] if p.get('parsed_by') else [])}  # the parser that gives masks looks at 64 px
    return [(p['faces'], p['n_faces'], s) for s in sorted(sizes)]

def done(names): return [f for n in names for f in (f'data/results/{n}.json', f'data/runs/{n}/done')]

def kept(name): return SHORT and os.path.isdir(f'data/weights/{name}')

def needs(w): return [*(PACKED[f] for f in faces(w.run)), *done(n for n in job(w.run)['needs'] if not kept(n))]

PACKED = {f: str(pack_path(*f).relative_to(pack_path(*f).parents[2])/'faces.json') for f in {f for n in STUDY + SHOWN for f in faces(n)}}
BY_PATH = {v: k for k, v in PACKED.items()}

localrules: demo, study

rule demo:
    input: done(SHOWN), PICTURES

rule study:
    input: done(STUDY), PICTURES

rule faces:
    output: 'data/faces/{pack}/faces.json'
    params: what=lambda w, output: [*map(str, BY_PATH[str(output)])]
    threads: 2
    run: warm(main, ['pack', *params.what])

rule row:
    input: needs
    output: 'data/results/{run}.json', touch('data/runs/{run}/done')  # results are in git, so the stamp says whether it ran here
    log: notebook='data/runs/{run}/{run}.ipynb'
    params: fingerprint=lambda w: fingerprint(w.run)
    threads: 1
    run: warm(main, ['launch', wildcards.run])

rule figure:
    input: done(SHOWN if SHORT else STUDY)
    output: 'figures/{name}.png'
    params: notebook=lambda w: next(k for k, v in FIGURES.items() if figure_name(v, SCALE) == w.name)
    run: warm(main, ['draw', params.notebook, SCALE])

"""How long the ruler takes: `OMP_NUM_THREADS=1 python benchmarks/ruler.py [n] [size]`

256 drawn faces of 128 px on one core by default, as a folder of PNGs, with all marks; faces and files are made before
the clock starts. Prints wall and CPU seconds: on a busy machine only the second says something."""
import os, sys, tempfile, time
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from facegen.evaluation.ruler import report, ruler_folder, save_report
from facegen.plotting import to_uint8
from facegen.synthetic.toyfaces import render_faces


def write(folder, pictures):
    folder.mkdir()
    for i, x in enumerate(pictures):
        Image.fromarray(x).save(folder/f'{i:04d}.png')


def timed(f, *args, **kw):
    wall, cpu = time.perf_counter(), time.process_time()
    value = f(*args, **kw)
    return value, time.perf_counter() - wall, time.process_time() - cpu


if __name__ == '__main__':
    n, size = (int(v) for v in (sys.argv[1:] + ['256', '128'][len(sys.argv) - 1:]))
    torch.set_num_threads(1)
    faces = render_faces(n=n, size=size, seed=5)
    with tempfile.TemporaryDirectory() as tmp:
        top = Path(tmp)
        write(top/'real', to_uint8(faces.image))
        write(top/'samples', to_uint8(faces.image.roll(3, -1)))
        write(top/'masks', faces.mask.numpy().astype('uint8'))
        print(f'{n} images of {size} px, {torch.get_num_threads()} thread')
        for label, more in {'without real images': {}, 'with real images': dict(real=top/'real')}.items():
            found, wall, cpu = timed(ruler_folder, top/'samples', top/'masks', **more)
            print(f'{label}: {wall:.1f} s, of them {cpu:.1f} s of CPU')
        _, wall, cpu = timed(save_report, found, top/'out')
        print(f'JSON and picture: {wall:.1f} s, of them {cpu:.1f} s of CPU')
        print(report(found).splitlines()[-2])

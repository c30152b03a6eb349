"""How fast is a training step, beside those of others?  python benchmarks/step.py --size laptop --steps 40 --device cpu

Each comparison has one network, one batch size and the same faces; loops take turns, so that ratios of neighbours do
not depend on the machine's load: `train` beside diffusers' example of unconditional training, and, in latents, beside
the published loop, which encodes every picture at every step. Weights are random. The others' loops are written anew
from what they do: JPEG files decoded at each access, all objects prepared by accelerate, AdamW, EMA, the loss fetched
and logged at each step (here into a file, which costs less than their trackers). `bare` is the network's own forward,
backward and optimiser step on one fixed batch; waiting is the share of a step that is none of these."""
import argparse, collections, copy, io, itertools, json, statistics, sys, tempfile, time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import VQModel
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from PIL import Image
from tqdm import tqdm
from transformers import SegformerConfig

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from facegen.conditioning.condition_encoders import Cond
from facegen.conditioning.conditional_unet import conditional_loss, make_denoiser
from facegen.conditioning.infonce import published_nce
from facegen.core import device
from facegen.data.faces import load_faces
from facegen.diffusion.schedules import make_scheduler
from facegen.models.latents import cache_latents, encode, make_autoencoder
from facegen.models.unet import make_unet
from facegen.plotting import to_uint8
from facegen.synthetic.toyfaces import pack_toyfaces
from facegen.training.loop import TrainConfig, diffusion_loss, train

PUBLISHED_SCALE, NOISE = .18215, make_scheduler()  # of latents; 1000 timesteps, linear, epsilon is predicted
VQ = dict(down_block_types=('DownEncoderBlock2D',)*3, up_block_types=('UpDecoderBlock2D',)*3, layers_per_block=2,
          block_out_channels=(128, 256, 512), latent_channels=3, num_vq_embeddings=8192)
SIZES = {  # networks and sides of faces; SegFormer's default configuration is B0
    'laptop': dict(unet='laptop', px=32, denoiser='laptop_latent', latent_px=64, batch=32, segformer=''),
    'paper':  dict(unet='baseline', px=128, denoiser='lc_unet_3_vqvae', latent_px=256, batch=4, autoencoder=VQ,
                   segformer=SegformerConfig().to_dict())}

class Files(torch.utils.data.Dataset):
    "JPEG files in memory, decoded, resized and flipped at every access"
    def __init__(self, faces):
        self.px, self.attrs, self.files = faces.size, faces.attrs, [io.BytesIO() for _ in range(len(faces))]
        for file, pixels in zip(self.files, to_uint8(faces[:].image)):
            Image.fromarray(pixels).save(file, 'JPEG')

    def __len__(self): return len(self.files)
    def __getitem__(self, i):
        image = Image.open(self.files[i]).convert('RGB').resize((self.px, self.px), Image.LANCZOS)
        x = torch.tensor(np.asarray(image)).permute(2, 0, 1).float()/127.5 - 1
        return x.flip(-1) if torch.rand(()) < .5 else x, self.attrs[i], torch.zeros(self.px, self.px, dtype=torch.long)

def logger(folder, copies):
    "Write each step's values to a progress bar, and as lines of a file"
    bar, file = tqdm(file=io.StringIO()), open(Path(folder)/'log.jsonl', 'a')
    def log(**values):
        print(*[json.dumps(values)]*copies, sep='\n', file=file, flush=True)
        bar.update(1)
        bar.set_postfix(**values)
    return log

def prepared(model, files, args, lr):
    acc = Accelerator(cpu=args.device.type == 'cpu')
    opt = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr, weight_decay=.01)
    loader = torch.utils.data.DataLoader(files, args.batch, shuffle=True, drop_last=True)
    model, opt, loader, schedule = acc.prepare(model, opt, loader, get_cosine_schedule_with_warmup(opt, 500, 100000))
    return acc, model, opt, (batch for _ in itertools.count() for batch in loader), schedule

def optimise(acc, clipped, loss, opt, schedule):
    acc.backward(loss)
    acc.clip_grad_norm_(clipped.parameters(), 1.)
    opt.step()
    schedule.step()
    opt.zero_grad()

def diffusers_example(model, files, args, folder):
    acc, model, opt, loader, schedule = prepared(model, files, args, 1e-4)
    ema, log = EMAModel(model.parameters(), decay=.9999, use_ema_warmup=True, power=.75), logger(folder, 1)
    for x0, *_ in loader:
        eps, t = torch.randn_like(x0), torch.randint(0, 1000, (len(x0),), device=x0.device)
        with acc.accumulate(model):
            loss = F.mse_loss(model(NOISE.add_noise(x0, eps, t), t).float(), eps)
            optimise(acc, model, loss, opt, schedule)
        ema.step(model.parameters())
        mean = acc.gather(loss.detach().repeat(len(x0))).mean()
        log(loss=mean.item(), lr=schedule.get_last_lr()[0], ema=ema.cur_decay_value)
        yield

def published_loop(model, vae, files, args, folder):
    acc, model, opt, loader, schedule = prepared(model, files, args, 2e-4)
    average, log = copy.deepcopy(model).requires_grad_(False), logger(folder, 2)  # it has two trackers
    for image, attrs, mask in loader:
        with torch.no_grad():
            x0 = encode(vae, image)*PUBLISHED_SCALE
        eps, t = torch.randn_like(x0), torch.randint(0, 1000, (len(x0),), device=x0.device)
        with acc.accumulate(model):
            tokens, _ = model.condition_encoder(Cond(attrs, mask))  # SegFormer looks at the mask here
            answer = model.net(NOISE.add_noise(x0, eps, t), t, tokens).sample
            loss = F.mse_loss(answer, eps) + published_nce(tokens.mean(1), attrs).mean()
            optimise(acc, model.net, loss, opt, schedule)
        with torch.no_grad():
            for a, p in zip(average.parameters(), model.parameters()):
                a.lerp_(p, 1e-4)
        log(loss=loss.item(), lr=schedule.get_last_lr()[0])
        yield

def bare(model, *inputs):
    model.train()
    opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-4, fused=True)
    while True:
        model(*inputs).square().mean().backward()
        opt.step()
        opt.zero_grad()
        yield

def ours(model, faces, loss, args, **changes):
    cfg = TrainConfig(steps=100000, batch=args.batch, save_every=100000, device=args.device.type, warmup=500,
                      deterministic=False, device_noise=args.device.type == 'cuda', **changes)
    yield from train(model, faces, loss, cfg)

def now(where):
    "Seconds of the processor on a CPU, whatever else it has to do; of the clock elsewhere, when a GPU is done"
    if where.type == 'cuda':
        torch.cuda.synchronize()
    return time.process_time() if where.type == 'cpu' else time.perf_counter()

def seconds(steps, n, fast, where):
    "Seconds a step of the next `n`; `fast`: as ours computes with `deterministic=False`"
    torch.backends.cudnn.benchmark = fast
    torch.set_float32_matmul_precision('high' if fast else 'highest')
    start = now(where)
    collections.deque(itertools.islice(steps, n), 0)
    return (now(where) - start)/n

def compare(title, contenders, args):
    "Let loops take turns; contenders: {name: (loop, whether fast arithmetic is allowed)}, ours first and bare last"
    print(f'\n{title}, batch {args.batch}, {args.device}', flush=True)
    for loop, fast in contenders.values():
        seconds(loop, 1 if args.device.type == 'cpu' else 20, fast, args.device)  # not counted
    block = max(1, args.steps//5)
    rounds = [{k: seconds(loop, block, fast, args.device) for k, (loop, fast) in contenders.items()}
              for _ in range(-(-args.steps//block))]
    first, *_, last = contenders
    for name in contenders:
        each = zip(*[(args.batch/r[name], 1 - r[last]/r[name], r[name]/r[first]) for r in rounds])
        speed, waiting, ratio = map(statistics.median, each)
        print(f'{name:34}{speed:8.2f} img/s  waiting {max(0, waiting):4.0%}  {ratio:6.2f} x time of ours', flush=True)

def without_conditions(args, tmp, unet, px, **_):
    faces = load_faces(pack_toyfaces(tmp/'faces', 2*args.batch, px))
    x, t = faces[:args.batch].image.to(args.device), torch.zeros(args.batch, dtype=torch.long, device=args.device)
    def network(): return make_unet(unet, px).to(args.device)
    compare(f'{unet} without conditions, {px} px', {
        'ours': (ours(network(), faces, diffusion_loss(NOISE), args), True),
        "diffusers' example": (diffusers_example(network(), Files(faces), args, tmp), False),
        'bare': (bare(network(), x, t), True)}, args)

def in_latents(args, tmp, denoiser, latent_px, segformer, autoencoder=None, **_):
    faces = load_faces(pack_toyfaces(tmp/'larger', args.batch, latent_px))
    vae = make_autoencoder() if autoencoder is None else VQModel(**autoencoder)
    vae = vae.eval().requires_grad_(False).to(args.device)
    start = now(args.device)
    latents = cache_latents(faces, vae, 'random', latent_px, tmp, PUBLISHED_SCALE, args.batch)
    once = (now(args.device) - start)/len(latents)
    x, attrs, mask = (v.to(args.device) for v in latents[:args.batch])
    t = torch.zeros(args.batch, dtype=torch.long, device=args.device)
    def network(row='published', encoder=segformer):
        return make_denoiser(denoiser, row, latent_px, segformer=encoder).to(args.device)
    published, plain = conditional_loss(NOISE, nce='published'), conditional_loss(NOISE)
    compare(f'{denoiser} with attributes and masks, {latent_px} px', {
        'ours, the published conditioning': (ours(network(), latents, published, args, flip=False), True),
        'ours, spatial conditioning': (ours(network('spatial', ''), latents, plain, args, flip=False), True),
        'the published loop': (published_loop(network(), vae, Files(faces), args, tmp), False),
        'bare': (bare(network(), x, t, Cond(attrs, mask)), True)}, args)
    print(f'ours encodes each face and its mirror image once: {once:.3f} s each')

if __name__ == '__main__':
    p = argparse.ArgumentParser(description='Speed of a training step')
    p.add_argument('--size', choices=SIZES, default='laptop', help='of networks and faces')
    p.add_argument('--steps', type=int, default=40, help='steps of each loop')
    p.add_argument('--device', default='', help='cpu, cuda or mps; the best there is if left out')
    p.add_argument('--batch', type=int, help='pictures a step')
    args = p.parse_args()
    try:
        args.device = device(args.device)
    except ValueError as e:
        p.error(str(e))
    args.batch = SIZES[args.size]['batch'] if args.batch is None else args.batch
    if args.steps < 1 or args.batch < 1:
        p.error('--steps and --batch must be 1 or more')
    torch.manual_seed(0)
    torch.set_num_threads(1)  # so that the processor's seconds are those of a step
    with tempfile.TemporaryDirectory() as tmp:
        without_conditions(args, Path(tmp), **SIZES[args.size])
        in_latents(args, Path(tmp), **SIZES[args.size])

"""Trains tiny networks on several processes: a script that imports once and forks.

Every group of processes is forked from one that has imported everything, as the imports take longer
than the training. Run as a script it gets one JSON object, see `train_on_processes`.
"""

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).parents[1]


def train_on_processes(folder, groups, timeout=240):
    """Train each group's cases, one after the other, on ``ranks`` processes that meet over gloo.

    Args:
        folder: gets a run's folder for every case.
        groups: ``{"ranks": 2, "cases": [{"run": name, ...}]}``, see `run_case`; where ``"dies"`` is
            true one of the processes is to be killed, else none may fail.

    Returns:
        What was printed to stderr.
    """
    path = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, __file__, json.dumps({"folder": str(folder), "groups": groups})],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr[-12000:]
    return done.stderr


def methods():
    """The methods at their smallest, by name; with the number of small views that they take.

    Left out are CrOC and CrIBo, whose clusters start at rows that each process draws for itself.
    """
    from local_distill.training import methods as m
    from local_distill.training.options import HeadOptions

    head = HeadOptions(num_prototypes=16, hidden_dim=24, bottleneck_dim=8)
    return {
        "Dino": (m.Dino(head), 1),
        "Glsd": (m.Glsd(head), 1),
        "Glsd, tables": (m.Glsd(head, fused=False), 1),
        "Esvit": (m.Esvit(head), 1),
        "Ibot": (m.Ibot(head, mask_ratios=((0.0, 0.0), (0.3, 0.5))), 1),
        "Densecl": (m.Densecl(8, 16, 32), 0),
        "Adasim": (m.Adasim(head, top_k=3, votes=5), 0),
        "Pixpro": (m.Pixpro(8, 16), 1),
        "Vicregl": (m.Vicregl(16, 16), 1),
        "SdsslMoco": (m.SdsslMoco(16, 16, 8), 0),
        "SdsslByol": (m.SdsslByol(16, 16, 8), 0),
        "SdsslSimclr": (m.SdsslSimclr(16, 16, 8), 0),
    }


@functools.cache
def recording_crop():
    import torch

    from local_distill import MultiCrop

    class RecordingCrop(MultiCrop):
        """Writes down what it draws from, and sends the process a signal at some image."""

        def __init__(self, *, path, stop, **settings):
            super().__init__(**settings)
            # loader workers have another pid than the process that trains
            self.path, self.stop, self.pid = path, stop, os.getpid()
            self.path.write_text("")

        def forward(self, image):
            with self.path.open("a") as stream:  # one short write: workers do not tear it
                stream.write(f"{torch.initial_seed()}\n")
            if self.stop is not None and len(self.path.read_text().split()) == self.stop[0]:
                os.kill(self.pid, signal.Signals[self.stop[1]])
            return super().forward(image)

    return RecordingCrop


def say(backbone):
    """The global token of a fixed image."""
    import torch

    dtype = next(backbone.parameters()).dtype
    image = torch.linspace(-1, 1, 3 * 16 * 16, dtype=dtype).reshape(1, 3, 16, 16)
    with torch.no_grad():
        return backbone.eval()(image).global_token


@functools.cache
def scenes():
    """20 images, drawn once."""
    from local_distill.training import SyntheticScenes

    drawn = SyntheticScenes(20, 24)
    return [drawn[number] for number in range(len(drawn))]


def run_case(
    folder,
    *,
    run,
    method="Glsd",
    ranks=1,
    batch=12,
    images=12,
    strategy="auto",
    precision="64-true",
    optim=None,
    drop_path=0.0,
    small=None,
    record=None,
    stop=None,
    draw=False,
    fabric=None,
    **settings,
):
    """Train one method for some steps, on this process as one of ``ranks``.

    Args:
        batch: images of one micro-batch, of all processes together.
        optim: of `OptimOptions`, in place of the ones here.
        small: number of small views, in place of the method's.
        record: a file in the run's folder that gets the seed of every image's views, which is of
            the epoch and the image; each rank has its own.
        draw: run the backbone that is given to be drawn, and write down what it said.
        stop: (rank, image, signal): sent to this rank at its so manieth image.
        settings: more of `train`.
    """
    from local_distill import MultiCrop
    from local_distill.training.options import BackboneOptions, OptimOptions, TeacherOptions
    from local_distill.training.processes import make_fabric
    from local_distill.training.trainer import train

    chosen, usual = methods()[method]
    size = {"img_size": 16, "patch_size": 8, "width": 24, "depth": 2}
    if drop_path:
        size["drop_path_rate"] = drop_path
    kind, more = MultiCrop, {}
    if record is not None:
        kind = recording_crop()
        rank = int(os.environ.get("LOCAL_RANK", 0))
        path = Path(folder) / f"{run}-{record}-{rank}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        own = stop is not None and stop[0] == rank
        more = {"path": path, "stop": stop[1:] if own else None}
    if draw:
        path = Path(folder) / f"{run}-drawn.json"
        settings["draw"] = lambda step, backbone: path.write_text(
            json.dumps(say(backbone).tolist())
        )
    settings = {"steps": 5, "log_every": 1, "drop_last": False} | settings
    return train(
        scenes()[:images],
        kind(
            global_size=16,
            local_size=8,
            local_count=usual if small is None else small,
            color_jitter=None,
            grayscale_p=0.0,
            blur_p=(0.0, 0.0, 0.0),
            solarize_p=0.0,
            **more,
        ),
        chosen,
        BackboneOptions(kwargs=size).build,
        num_global=2,
        output=Path(folder) / run,
        batch_size=batch // ranks,
        optim=OptimOptions(**({"lr": 1e-3, "warmup": 2} | (optim or {}))),
        teacher=TeacherOptions(momentum=0.9),
        fabric=fabric
        or make_fabric(accelerator="cpu", devices=ranks, strategy=strategy, precision=precision),
        **settings,
    )


def measure_case(folder, *, run, method, ranks=1, strategy="auto", optim="adamw", accumulate=1):
    """Write down what a rank holds after two steps, and what was sent in the second; in bytes."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    from local_distill.distributed import local_part
    from local_distill.training.loading import ViewBatch
    from local_distill.training.options import BackboneOptions, OptimOptions
    from local_distill.training.processes import make_fabric
    from local_distill.training.progress import Progress
    from local_distill.training.run_setup import set_up

    class Sent(TorchDispatchMode):
        """Of each collective what a ring algorithm sends; not of scalars."""

        def __init__(self):
            super().__init__()
            self.by_name = {}

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.namespace == "c10d":
                name = function._opname
                leaves = [
                    leaf
                    for leaf in torch.utils._pytree.tree_leaves(args)
                    if isinstance(leaf, torch.Tensor)
                ]
                size = max((leaf.nbytes for leaf in leaves), default=0)
                if size > 8:
                    # of an all-reduce both ways; of an all-gather to a list what is put in
                    times = {"allreduce_": 2 / ranks, "allgather_": 1}.get(name, 1 / ranks)
                    sent = times * (ranks - 1) * size
                    self.by_name[name] = self.by_name.get(name, 0) + sent
            return function(*args, **(kwargs or {}))

    def size(tensors):
        return sum(local_part(value).nbytes for value in tensors)

    chosen, small = methods()[method]
    fabric = make_fabric(accelerator="cpu", devices=ranks, strategy=strategy)
    fabric.launch()
    torch.manual_seed(0)
    build = BackboneOptions(kwargs={"img_size": 16, "patch_size": 8, "width": 24, "depth": 2}).build
    parts = set_up(fabric, chosen, build, OptimOptions(name=optim), num_global=2, num_images=9)
    views = [torch.randn(2, 3, 16, 16) for _ in range(2)]
    views += [torch.randn(2, 3, 8, 8) for _ in range(small)]
    geometries = [whole_view(view) for view in views]
    batch = ViewBatch(views, geometries, torch.arange(2), {})
    sent = Sent()
    for step in range(2):
        with sent if step == 1 else contextlib.nullcontext():
            for micro in range(1, accumulate + 1):
                with fabric.no_backward_sync(parts.wrapped, enabled=micro < accumulate):
                    fabric.backward(chosen.step(parts.models, batch, Progress(step, 9)).loss)
        gradients = size(p.grad for p in parts.network.parameters() if p.grad is not None)
        parts.optimizer.step()
        parts.optimizer.zero_grad()
    state = [
        value
        for values in parts.optimizer.state.values()
        for value in values.values()
        if isinstance(value, torch.Tensor) and value.dim() > 0
    ]
    teacher = parts.models.teacher
    held = {
        "parameters": size(parts.network.parameters()),
        "gradients": gradients,
        "moments": size(state),
        "teacher": 0 if teacher is None else size(teacher.parameters()),
    }
    path = Path(folder) / f"{run}-{fabric.global_rank}.json"
    path.write_text(json.dumps({"held": held, "sent": sent.by_name}))


def whole_view(view):
    """The geometry of views that show the whole of a source of 16 pixels."""
    import torch

    from local_distill import from_box

    box = torch.tensor([[0.0, 0.0, 16.0, 16.0]]).expand(len(view), 4)
    return from_box(box, tuple(view.shape[-2:]), (16, 16))


def _rank(rank, ranks, folder, meeting, cases):
    import torch
    import torch.distributed as dist

    # As torchrun says it, but for the meeting: a free port may be taken before it is used.
    os.environ.update(LOCAL_RANK=str(rank), NODE_RANK="0", WORLD_SIZE=str(ranks))
    torch.set_num_threads(1)
    if ranks > 1:
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=ranks)
    for case in cases:
        do = measure_case if case.pop("measure", False) else run_case
        do(folder, ranks=ranks, **case)


def _main():
    import torch.multiprocessing as mp

    from local_distill.training.options import BackboneOptions

    BackboneOptions(kwargs={"depth": 1}).build()  # imports timm
    scenes()
    wanted = json.loads(sys.argv[1])
    with tempfile.TemporaryDirectory() as meetings:
        for number, group in enumerate(wanted["groups"]):
            meeting = (Path(meetings) / str(number)).as_uri()
            given = group["ranks"], wanted["folder"], meeting, group["cases"]
            try:
                mp.start_processes(_rank, given, nprocs=group["ranks"], start_method="fork")
            except mp.ProcessExitedException:
                if not group.get("dies"):
                    raise
            else:
                assert not group.get("dies"), "no process died"


if __name__ == "__main__":
    _main()

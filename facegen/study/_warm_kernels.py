"""A notebook's kernel that has its imports already: forked, not started.

Importing torch, diffusers and the rest takes longer than many a run at scale `smoke`. So one server process imports
everything once (`warm`), each run is forked off it, and so is the kernel of its notebook (`forked`). None of them
outlives the process that asked for it, whatever ended that one: an orphan would go on writing into its run's folder."""

__all__ = ['Kernel', 'Manager', 'die_with', 'forks', 'forked', 'imports', 'warm']

import ctypes, multiprocessing, os, pkgutil, signal, sys, threading
from contextlib import contextmanager
from pathlib import Path

from jupyter_client import AsyncKernelManager

import facegen


PR_SET_PDEATHSIG = 1  # of prctl(2)


def die_with(
    parent:int, # Process that this one was forked off
):
    "On Linux, be killed when the parent ends: SIGKILL leaves it no time to tell anybody"
    if not forks(): return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it ended before that was arranged
        os._exit(1)


class Kernel(multiprocessing.get_context('fork').Process):
    "A copy of this process, imports and all, that waits until it is asked to be a kernel"
    stdin = stdout = stderr = None  # Jupyter expects a `subprocess.Popen`, and this is what a `Process` lacks

    def poll(self): return self.exitcode

    def wait(self):
        self.join()
        return self.exitcode

    def send_signal(self, sig):
        os.kill(self.pid, sig)

    def __init__(self):
        super().__init__()
        self.sender, self.receiver = multiprocessing.Pipe()
        self.parent = os.getpid()
        self.start()
        self.receiver.close()

    def __enter__(self): return self

    def __exit__(self, *_):
        self.sender.close()  # a copy that was never asked ends here
        self.join(9)
        self.kill()
        self.join()

    def start_kernel(
        self,
        argv:list, # Arguments of ipykernel, connection file first
        env:dict,  # Its environment, complete
        cwd:str,   # Its working folder
    ):
        "Ask the copy to be a kernel"
        self.sender.send((argv, env, cwd))

    def run(self):
        "What the copy does: wait, then be a kernel"
        die_with(self.parent)  # ipykernel looks for its parent only if JPY_PARENT_PID is set before it is imported
        self.sender.close()
        os.setsid()  # a group of its own, so that interrupting and killing reach its children too
        try:
            argv, env, cwd = self.receiver.recv()
        except EOFError: return
        os.environ.clear()
        os.environ.update(env)
        os.chdir(cwd)
        from ipykernel.kernelapp import IPKernelApp
        IPKernelApp.launch_instance(argv=argv)


class Manager(AsyncKernelManager):
    "What nbclient and papermill ask for kernels: `kernel_manager_class=Manager`"
    waiting = None  # The Kernel to use next; None starts one in the ordinary way

    async def _async_launch_kernel(self, cmd, **kw):
        kernel, Manager.waiting = Manager.waiting, None
        if kernel is None: return await super()._async_launch_kernel(cmd, **kw)
        provisioner = self.provisioner
        provisioner.process, provisioner.pid, provisioner.pgid = kernel, kernel.pid, kernel.pid
        provisioner.cwd = str(kw.get('cwd') or Path.cwd())
        env = {**kw.get('env', os.environ), 'JPY_PARENT_PID': str(os.getpid())}
        kernel.start_kernel(cmd[cmd.index('-f'):], env, provisioner.cwd)
        self._reconcile_connection_info(provisioner.connection_info)


def forks()->bool: # Whether kernels can be forked here
    "Only Linux forks safely: elsewhere system libraries keep threads of their own"
    return sys.platform == 'linux'


@contextmanager
def forked():
    "Fork the next kernel of `Manager` off this process, where that can be; enter the block before there are threads"
    if not forks():
        yield
        return
    with Kernel() as kernel:
        Manager.waiting = kernel
        yield


def imports()->list: # Names of modules
    "What a run is going to import"
    ours = [m.name for m in pkgutil.walk_packages(facegen.__path__, 'facegen.') if not m.ispkg]
    return ['__main__', *ours, 'ipykernel.kernelapp', 'papermill', 'matplotlib_inline.backend_inline', 'seaborn']


def end_with(process):
    "Wait for a process, then end this one"
    process.join()
    os._exit(1)


def call_here(call, *args):
    "Call a function, and stop in the middle of it when the process that called `warm` ends"
    # not by `die_with`: the parent here is the server, which lives as long as one of its children
    threading.Thread(target=end_with, args=(multiprocessing.parent_process(),), daemon=True).start()
    call(*args)


def warm(
    call,  # A function that a module defines
    *args, # Its arguments
):         # Nothing; raises RuntimeError when the process fails
    "Call in a process of its own that need not import anything; elsewhere than on Linux it does import"
    context = multiprocessing.get_context('forkserver' if forks() else 'spawn')
    if forks():
        context.set_forkserver_preload(imports())
    p = context.Process(target=call_here, args=(call, *args))
    p.start()
    p.join()
    if p.exitcode:
        said = ', '.join(map(repr, args))
        raise RuntimeError(f'{call.__name__}({said}) failed; its messages stand above')

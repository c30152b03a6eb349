"""What `make demo` costs: CPU seconds of the whole machine, of its own processes, wall clock, and what git says then.

    python benchmarks/demo.py [words for make, e.g. SCALE=smoke]     (Linux, in the top folder, after `make setup`)

`time make demo` counts less than half: runs are forked off a server, which nobody waits for. So CPU seconds are read
from /proc/stat before and after, over all processes: right if the machine has nothing else to do. The second number
adds up the demo's own processes: this script adopts those whose parents have ended, and waits for all. It is right on
a busy machine too.
"""
import ctypes, os, resource, subprocess, sys, time
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36


def machine_seconds():
    "CPU seconds that all processes have used since the machine started"
    user, nice, system, idle, iowait, irq, softirq, steal = map(int, Path('/proc/stat').read_text().split()[1:9])
    return (user + nice + system + irq + softirq)/os.sysconf('SC_CLK_TCK')


def wait_for_all():
    "Wait for processes that were adopted; a minute at most"
    end = time.monotonic() + 60
    while time.monotonic() < end:
        try: pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError: return
        if not pid:
            time.sleep(.2)


def main(words):
    if ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        sys.exit('benchmarks/demo.py needs Linux: processes whose parents have ended cannot be adopted here')
    before, start = machine_seconds(), time.monotonic()
    code = subprocess.run(words).returncode
    wall = time.monotonic() - start
    wait_for_all()
    whole, used = machine_seconds() - before, resource.getrusage(resource.RUSAGE_CHILDREN)
    changed = subprocess.run(['git', 'status', '--short'], capture_output=True, text=True).stdout
    print(f'exit code {code}; wall {wall:.0f} s; CPU of the machine {whole:.0f} s, of these processes '
          f'{used.ru_utime + used.ru_stime:.0f} s; git status: {len(changed.splitlines())} lines', changed, sep='\n')
    return code


if __name__ == '__main__':
    words = sys.argv[1:]
    sys.exit(main(words[1:] if words[:1] == ['--'] else ['make', 'demo', *words]))

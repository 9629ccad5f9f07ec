"""Programs that do what a sampled program might do, by accident or not, and the statuses that they may end with."""

from executor_tools import body

FORGE = """os.write(3, b'["ok", "0x1p+1", "", false]\\n')"""
CLASS = "class Thing{bases}:\n    def {method}(self, *args): {does}\n"
LIBC = "libc = ctypes.CDLL(None, use_errno=True)"

# name: (program, statuses)
HOSTILE: dict[str, tuple[str, str]] = {
    # time
    "hangs while it is compiled": ("x = " + "-" * 20_000 + "1\n" + body("return 1"), "syntax_error killed timeout"),
    "hangs at the first line": ("import itertools\nfor _ in itertools.repeat(0): pass\n", "timeout"),
    "multiplies big numbers": (body("n = 7", "while True: n = n * n"), "timeout memory"),
    "a pattern that backtracks": (body("import re", "return len(re.findall('(x+x+)+y', 'x' * 60))"), "timeout"),
    "swallows every exception": (
        body("while True:", "    try: raise KeyboardInterrupt", "    except BaseException: continue"),
        "timeout",
    ),
    "hangs when converted": (CLASS.format(bases="", method="__float__", does="[None for _ in iter(int, 1)]")
        + body("return Thing()"), "timeout memory"),
    "hangs when it is freed": (CLASS.format(bases="", method="__del__", does="\n        while 1: pass")
        + body("thing = Thing()", "return 1"), "timeout"),
    "waits for another's program": (body("import os", "return len(os.read(3, 10**6))"), "timeout"),
    "no alarm wakes it": (
        body("import signal", "signal.pthread_sigmask(0, range(1, 65))", "while True: signal.pause()"), "timeout"
    ),
    # memory
    "a long text": (body("return len('%0999999999d' % 7)"), "memory"),
    "a tower of lists": (body("rows = [[0] * 10**7 for _ in range(10**6)]", "return len(rows)"), "memory"),
    "a shared map": (body("import mmap", "return len(mmap.mmap(-1, 1 << 36))"), "exception"),
    "exact to a billion digits": (
        body("import decimal", "decimal.getcontext().prec = 10**9", "return decimal.Decimal(1) / 7"), "memory timeout"
    ),
    "endless recursion in C": (
        body("import functools, sys", "sys.setrecursionlimit(10**8)", "f = lambda: 0",
             "for _ in range(10**6): f = functools.partial(f)", "return f()"), "killed ok exception memory timeout"
    ),
    # processes and signals
    "vfork by hand": (body("import ctypes", LIBC, "return libc.vfork()"), "ok"),
    "clone by number": (body("import ctypes", LIBC, "return libc.syscall(56, 17, 0, 0, 0, 0) + 8"), "ok"),
    "a pool of processes": (
        body("import multiprocessing", "with multiprocessing.Pool(2) as pool: return sum(pool.map(abs, [1]))"),
        "refused exception",
    ),
    "becomes another program": (body("import os", "os.execv('/usr/bin/env', ['env'])"), "refused"),
    "aborts": (body("import os", "os.abort()"), "killed"),
    "threads without end": (
        body("import _thread", "while True: _thread.start_new_thread(print, ())"), "exception refused"
    ),
    "an executor of its own": (
        body("from concurrent.futures import ThreadPoolExecutor",
             "return sum(ThreadPoolExecutor(4).map(float, range(5)))"), "exception"
    ),
    "kills its siblings": (
        body("import os", "for pid in range(2, 400):", "  try: os.kill(pid, 9)", "  except OSError: pass", "return 1"),
        "ok",
    ),
    # files, network, other processes
    "an empty file": (body("import os", "return os.open('/tmp/reft_test_leftover', os.O_CREAT)"), "refused"),
    "a database": (
        body("import sqlite3", "sqlite3.connect('/tmp/reft_test_leftover').execute('create table t(x)')"), "exception"
    ),
    "a named pipe": (body("import os", "os.mkfifo('/tmp/reft_test_leftover')"), "refused"),
    "memory with a name": (
        body("from multiprocessing import shared_memory as shm", "shm.SharedMemory('reft_test', True, 10)"), "refused"
    ),
    "memory of process 1": (body("return len(open('/proc/1/mem', 'rb').read(10))"), "refused"),
    "what root has": (body("import os", "return len(os.listdir('/root'))"), "refused"),
    "a web page": (
        body("import urllib.request", "return len(urllib.request.urlopen('http://127.0.0.1:9').read())"),
        "exception refused",
    ),
    "an event loop": (body("import asyncio", "return asyncio.run(asyncio.sleep(0, 1))"), "refused exception"),
    "signals from a descriptor": (
        body("import fcntl, os", "fcntl.fcntl(3, 10, 9)", "fcntl.fcntl(3, fcntl.F_SETOWN, os.getppid())"), "refused"
    ),
    "more memory than it was given": (
        body("import resource", "resource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40))", "return 1"),
        "exception",
    ),
    # the report
    "reports for itself, then hangs": (body("import os", FORGE, "while True: pass"), "ok"),
    "closes its socket": (body("import os", "os.close(3)", "return 1"), "killed"),
    "floods its socket": (body("import os", "while True: os.write(3, b'9' * 65536)"), "killed"),
    "half a report": (body("import os", """os.write(3, b'["ok", "0x1p')""", "os._exit(0)"), "killed"),
    "another json": ("import json\njson.dumps = lambda *a, **k: 'true'\n" + body("return 1"), "killed"),
    "a class with a name too long": ("E = type('E' * 10**6, (Exception,), {})\n" + body("raise E"), "exception"),
    "a float that converts to text": (
        CLASS.format(bases="(float)", method="__float__", does="return 'x'") + body("return Thing(1)"), "wrong_type"
    ),
    "a number that becomes infinite": (
        CLASS.format(bases="(int)", method="__float__", does="return float('inf')") + body("return Thing(1)"),
        "not_finite",
    ),
    "a generator": (body("yield 1"), "wrong_type"),
    "no main": ("import sys\nsys.modules.clear()\n" + body("return 2"), "ok exception killed"),
}  # fmt: skip

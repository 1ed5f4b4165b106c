"""What everywhere defines is each process's own, and goes by name to those that have it."""

import sys

import pytest

from tests.integration.helpers import Script, run_script

BEGIN = """
import gc, os, weakref
import shmdist as sd
pids = a, b = sd.addprocs(2)
theirs = [sd.remotecall_fetch(os.getpid, pid) for pid in pids]
def same(one, other): assert one == other, (one, other)
def on_each(f, *args): return [sd.remotecall_fetch(f, pid, *args) for pid in pids]
"""

DEFINE = """
sd.everywhere('''
import dataclasses, enum, functools, os
who = os.getpid(); store = {}; count = 0
class V:
    n = 0
    def grow(self): V.n += 1; return V.n
    class Inner: pass
class W(V): pass
class MyError(Exception): pass
class Color(enum.Enum): RED = 1
@dataclasses.dataclass
class D: x: int = 0
def keep(k): store[k] = 1; return sorted(store)
def inc():
    global count
    count += 1
    return count
def fail(): raise MyError("boo")
@functools.lru_cache
def cached(x): return x, os.getpid()
def check(v): return type(v) is V, isinstance(v, V)
alias = keep
''')
def catch():
    try: sd.remotecall_fetch(fail, b if sd.myid() == a else a)
    except MyError: return "caught"
"""

STATE = (
    BEGIN
    + DEFINE
    + """
for n in range(1, 5):  # the bytes of what was called before may be kept
    same(on_each(lambda: who), theirs)
    same(sd.remotecall_fetch(inc, a), n)
same(sd.remotecall_fetch(lambda: (inc(), count), a), (5, 5))  # a global that changes meanwhile
same(sd.pmap(lambda i: (inc(), count), [0, 0], pool=[a], batch_size=1), [(6, 6), (7, 7)])
same(inc(), 1)
same(on_each(lambda: count), [7, 0])
same(sd.remotecall_fetch(keep, a, "x"), ["x"])
same(sd.remotecall(keep, a, "y").fetch(), ["x", "y"])
same(sd.remotecall_fetch(alias, a, "z"), ["x", "y", "z"])
same(on_each(lambda: len(store)), [3, 0])
for kind in (V, W, D):
    same(sd.remotecall_fetch(kind, a).__class__, kind)
    same(sd.remotecall_fetch(lambda: kind, a), kind)
    for size in (None, 1, 5):
        same({type(x) for x in sd.pmap(lambda i: kind(), range(6), batch_size=size)}, {kind})
same(sd.remotecall_fetch(check, a, V()), (True, True))
same(sd.pmap(check, [V(), W()]), [(True, True), (False, True)])
same(type(sd.remotecall_fetch(V.Inner, a)), V.Inner)
same([sd.remotecall_fetch(V.grow, a, V()), sd.remotecall_fetch(V().grow, a), V.n], [1, 2, 0])
assert sd.remotecall_fetch(lambda: Color.RED, a) is Color.RED
assert sd.remotecall_fetch(lambda c: c is Color.RED, a, Color.RED)
roads = [
    lambda: sd.remotecall_fetch(fail, a),
    lambda: sd.remotecall(fail, a).fetch(),
    lambda: sd.pmap(lambda i: fail(), [1]),
    lambda: list(sd.pgenerate(lambda i: fail(), [1])),
    lambda: sd.distributed(max)(lambda i: fail())(range(2)),
]
for road in roads:
    try: road()
    except MyError as error: assert isinstance(error.captured.ex, MyError)
    else: raise AssertionError("no error")
same(sd.remotecall_fetch(catch, a), "caught")
same(on_each(cached, 1), [(1, pid) for pid in theirs])
same(on_each(lambda: cached(1)), [(1, pid) for pid in theirs])
same(on_each(lambda: cached.cache_info().hits), [1, 1])
channel = sd.RemoteChannel(lambda: sd.Channel(9), a)
channel.put(V()); assert type(channel.take()) is V
channel.put(V()); assert sd.remotecall_fetch(lambda: type(channel.take()) is V, b)
future = sd.remotecall(V, a); assert sd.remotecall_fetch(lambda: type(future.fetch()) is V, b)
same(sorted(set(sd.pmap(lambda i: who, range(20), pool=sd.CachingPool(pids), batch_size=1))), sorted(theirs))
same(sd.remotecall_fetch(lambda: sd.remotecall_fetch(lambda: who, b), a), theirs[1])
same(sd.remotecall_fetch(sd.remotecall_fetch, a, inc, b), 1)
box = sd.RemoteChannel(lambda: sd.Channel(9))
sd.remote_do(lambda: box.put(who), b); same(box.take(), theirs[1])
sd.everywhere('''
class CannotGo:
    def __reduce__(self): raise RuntimeError("sent")
stays = CannotGo()
''')
same(on_each(lambda: type(stays).__name__), ["CannotGo"] * 2)
sd.everywhere("import numpy; data = numpy.ones(100_000)")
same(sd.pmap(lambda i: data.sum(), range(2)), [1e5] * 2)
here = weakref.ref(data)
data = None
assert here() is None, "the note of what was defined keeps no array alive"
same(on_each(lambda: data), [None] * 2)
print("ok")
"""
)

REDEFINED = (
    BEGIN
    + """
scale = 2
sd.everywhere("factor = 10; who = __import__('os').getpid()")
def mine(x): return scale * factor * x
same(on_each(mine, 1), [20, 20])
scale = 3
same(on_each(mine, 1), [30, 30])
sd.everywhere("factor = 11", procs=[a])
same([*on_each(mine, 1), mine(1)], [33, 30, 30])
factor = 100  # the program's own from now on
same(on_each(mine, 1), [300, 300])
sd.everywhere("factor = 10")
same(on_each(mine, 1), [30, 30])
own = 7
for procs in ([a], a):
    sd.everywhere("own = q", procs=procs, q=1)
    same(on_each(lambda: own), [1, 7])
own = 8
same(on_each(lambda: own), [8, 8])

@sd.everywhere
def g(): return 1, who
same(on_each(g), [(1, pid) for pid in theirs])
def use(): return g()[0]
old = g
@sd.everywhere
def g(): return 2, who
same(on_each(g), [(2, pid) for pid in theirs])
same(on_each(old), [(1, pid) for pid in theirs])
for _ in range(3): same(on_each(use), [2, 2])
sd.everywhere("def g(): return 3, who")
for _ in range(3): same(on_each(use), [3, 3])
same(on_each(g), [(3, pid) for pid in theirs])
@sd.everywhere(procs=[a])
def g(): return 4, who
same(on_each(g), [(4, pid) for pid in theirs])
for _ in range(3): same(on_each(use), [4, 4])
same(sd.everywhere("g()[0]", procs=b), 3)
def g(): return 5, who
same(on_each(g), [(5, pid) for pid in theirs])

sd.everywhere('''
import shmdist
if shmdist.myid() == 1: only_here = "here"
else:
    class Theirs: pass
    def make(): return Theirs()
''')
same(on_each(lambda: only_here), ["here"] * 2)
one, other = (sd.everywhere("make()", procs=pid) for pid in pids)
assert type(one) is type(other) and type(one).__name__ == "Theirs"
assert sd.remotecall_fetch(lambda x: type(x) is Theirs, b, one)
try: sd.everywhere("partly = 1; assert shmdist.myid() != q, 'no'", q=b)
except sd.CompositeException: pass
same(on_each(lambda: partly), [1, 1])
print("ok")
"""
)

LATER = (
    BEGIN
    + DEFINE
    + """
pool = sd.CachingPool(pids)
shown = lambda i: (sd.myid(), who)
same(dict(sd.pmap(shown, range(20), pool=pool, batch_size=1)), dict(zip(pids, theirs)))
same(inc(), 1)
c, = sd.addprocs(1)
for _ in range(3):
    same(sd.remotecall_fetch(inc, c), 2)  # by value, with the globals here
    same([sd.remotecall_fetch(lambda: who, pid) for pid in (a, b, c)], [*theirs, os.getpid()])
    same([type(sd.remotecall_fetch(V, c)), type(sd.remotecall_fetch(lambda: W(), c))], [V, W])
same(sd.remotecall_fetch(lambda: sd.remotecall_fetch(check, a, V()), c), (True, True))
same(sd.remotecall_fetch(lambda v: sd.remotecall_fetch(check, a, v), c, W()), (False, True))
same(sd.remotecall_fetch(lambda: check(sd.remotecall_fetch(W, a)), c), (False, True))
same({type(x) for x in sd.pmap(lambda i: V(), range(12), batch_size=1)}, {V})
same(sd.remotecall_fetch(catch, c), "caught")
pool.push(c)
same(dict(sd.pmap(shown, range(60), pool=pool, batch_size=1))[c], os.getpid())
sd.everywhere("who = os.getpid() if 'os' in globals() else 0\\ndef inc(): return who")
same([sd.remotecall_fetch(inc, pid) for pid in (a, b, c)], [*theirs, 0])
same(sd.remotecall_fetch(lambda: sd.remotecall_fetch(inc, a), c), theirs[0])
sd.rmprocs(c)
same(on_each(inc), theirs)
print("ok")
"""
)

SORTS = (
    BEGIN
    + """
import abc, enum, functools, typing
import numpy as np
sd.everywhere("import os; mine = os.getpid()")
sd.everywhere('''
import abc, enum, functools, typing, collections
def deco(f):
    @functools.wraps(f)
    def w(*a): return ('w', f(*a), mine)
    return w
@deco
def wrapped(x): return x
h = lambda x: (x, mine)
part = functools.partial(h, 7)
T = typing.TypeVar('T')
class P(typing.Generic[T]):
    def __init__(self, x): self.x = x
    def __eq__(self, o): return type(o) is type(self) and o.x == self.x
    __hash__ = None
class NT(typing.NamedTuple):
    a: int
class Shape(abc.ABC):
    @abc.abstractmethod
    def area(self): ...
class Sq(Shape):
    __slots__ = ('s',)
    def __init__(self, s): self.s = s
    def area(self): return self.s ** 2
class Meta(type): pass
class M(metaclass=Meta): pass
class Flag(enum.Flag):
    A = 1; B = 2
@functools.singledispatch
def sdisp(x): return ('obj', mine)
@sdisp.register
def _(x: int): return ('int', mine)
class Disp:
    @functools.singledispatchmethod
    def kind(self, x): return ('obj', mine)
    @kind.register
    def _(self, x: int): return ('int', mine)
def outer():
    def inner(): return mine
    return inner
async def co(): return mine
def gen():
    yield mine
''')
same(on_each(wrapped, 1), [('w', 1, m) for m in theirs])
same(on_each(h, 1), [(1, m) for m in theirs])
same(on_each(lambda: h(2)), [(2, m) for m in theirs])
same(on_each(part), [(7, m) for m in theirs])
same(on_each(lambda: part()), [(7, m) for m in theirs])
same(sd.remotecall_fetch(P, a, 3), P(3))
same(sd.remotecall_fetch(lambda p: p == P(4), a, P(4)), True)
same(sd.remotecall_fetch(NT, a, 1), NT(1))
same(type(sd.remotecall_fetch(NT, a, 1)), NT)
same(sd.remotecall_fetch(Sq, a, 3).area(), 9)
same(isinstance(sd.remotecall_fetch(Sq, a, 3), Shape), True)
same(sd.remotecall_fetch(lambda s: isinstance(s, Shape) and type(s) is Sq, a, Sq(2)), True)
same(type(sd.remotecall_fetch(M, a)), M)
same(sd.remotecall_fetch(lambda x: x is (Flag.A | Flag.B), a, Flag.A | Flag.B), True)
same(on_each(sdisp, 1), [('int', m) for m in theirs])
same(on_each(sdisp, 'x'), [('obj', m) for m in theirs])
for _ in range(2):  # it has been bound then, here as well
    same(on_each(Disp().kind, 1), [('int', m) for m in theirs])
    same(on_each(lambda d: d.kind('x'), Disp()), [('obj', m) for m in theirs])
    same(on_each(lambda: Disp().kind(1)), [('int', m) for m in theirs])
same(on_each(outer()), theirs)
same(on_each(lambda: outer()()), theirs)
same(on_each(lambda: next(gen())), theirs)
arr = np.array([NT(1), P(2), None], dtype=object); r = sd.remotecall_fetch(lambda x: x, a, arr)
same([type(x) for x in r], [type(x) for x in arr])
same([type(x) for x in sd.pmap(lambda x: x, [P(1), Sq(2), M()], batch_size=2)], [P, Sq, M])
# script class inheriting from everywhere's, and other way round
class Mine(Sq):
    def area(self): return -1
same(sd.remotecall_fetch(lambda s: (isinstance(s, Sq), s.area()), a, Mine(2)), (True, -1))
same(type(sd.remotecall_fetch(Mine, a, 1)), Mine)
class Plain: pass
@sd.everywhere
class Derived(Plain):
    def who(self): return mine
same(on_each(lambda d: (isinstance(d, Plain), d.who()), Derived()), [(True, m) for m in theirs])
# everywhere of an existing function; unpicklable global
def later_def(x): return x, mine
sd.everywhere(later_def)
same(on_each(later_def, 1), [(1, m) for m in theirs])
print("ok")
"""
)

DISPATCHED = (
    BEGIN
    + """
import functools
@functools.singledispatch
def kind(x): return "object"
@kind.register
def _(x: int): return "int"
@kind.register
def _(x: list): return [kind(each) for each in x]
class A:
    def __init__(self, n): self.n = n
    @functools.singledispatchmethod
    def kind(self, x): return "object"
    @kind.register
    def _(self, x: int): return "int", self.n
    @kind.register
    def _(self, x: list): return [visit(each) for each in x]
    @functools.singledispatchmethod
    @classmethod
    def made(cls, x): return cls(x)
@kind.register
def _(x: A): return "A"
visit = A(0).kind
def bind(x):
    x.bound = x.kind
    return x
for _ in range(2):
    same([A(9).kind(1), kind(A(1)), visit([1])], [("int", 9), "A", [("int", 0)]])
    same(on_each(kind, [1, A(1), ""]), [["int", "A", "object"]] * 2)
    same(on_each(lambda f: f([1, A(1)]), kind), [["int", "A"]] * 2)
    same(on_each(A(3).kind, 1), [("int", 3)] * 2)
    same(on_each(visit, [1, ""]), [[("int", 0), "object"]] * 2)
    same([x.kind(1) for x in on_each(A, 4) + on_each(A.made, 4)], [("int", 4)] * 4)
    same(on_each(lambda: (A(5).kind(1), A.made(5).n, kind(A(5)))), [(("int", 5), 5, "A")] * 2)
    same([x.bound(1) for x in on_each(bind, A(6))], [("int", 6)] * 2)
    same([f(1) for f in on_each(lambda: A(7).kind) + on_each(lambda: kind)], [("int", 7)] * 2 + ["int"] * 2)
    for size in (None, 1, 5):
        same(sd.pmap(kind, [1, "", A(1)], batch_size=size), ["int", "object", "A"])
        same(sd.pmap(A(8).kind, [1, [""]], batch_size=size), [("int", 8), ["object"]])
    same(list(sd.pgenerate(lambda x: x.kind(1), [A(9)])), [("int", 9)])
    loop = sd.distributed(list.__add__)(lambda i: [kind(i), A(i).kind(i)])
    same(loop(range(1, 3)), ["int", ("int", 1), "int", ("int", 2)])
sd.everywhere(kind), sd.everywhere(A)
same(on_each(lambda: (kind(A(1)), A(2).kind(1))), [("A", ("int", 2))] * 2)
same(on_each(A(3).kind, 1), [("int", 3)] * 2)
pids = sd.addprocs(1)
same(on_each(lambda: (kind(A(1)), A(2).kind(1))), [("A", ("int", 2))])
same(on_each(A(3).kind, 1), [("int", 3)])
print("ok")
"""
)

EARLY = r"""
import os
import shmdist as sd
def same(one, other): assert one == other, (one, other)
sd.everywhere("early = 5\ndef ef(): return early")
same(sd.pmap(lambda i: early + i, [1]), [6])
same(sd.remotecall_fetch(ef, 1), 5)
pids = a, b = sd.addprocs(2)
def on_each(f, *args): return [sd.remotecall_fetch(f, pid, *args) for pid in pids]
same(on_each(lambda: early), [5, 5])
same(on_each(ef), [5, 5])
for bs in (None,1,5): same(sd.pmap(lambda i: ef() + early, range(4), batch_size=bs), [10]*4)
# state through functions only
sd.everywhere("def init(v):\n  global data\n  data = v\ndef get(): return data")
sd.remotecall_wait(init, a, 'A'); sd.remotecall_wait(init, b, 'B')
same(on_each(get), ['A','B'])
same(on_each(lambda: data), ['A','B'])
init('one')
same(on_each(lambda: data), ['A','B'])
same(data, 'one')
same(sd.remotecall_fetch(lambda: (init('C'), data)[1], a), 'C')
same(sd.remotecall_fetch(lambda: data, a), 'C')
sd.remotecall_wait(init, a, 'A')
same(sorted(set(sd.pmap(lambda i: data, range(20), batch_size=1))), ['A','B'])
# from a worker
sd.remotecall_wait(lambda: sd.everywhere("zz = 1; import os; mine = os.getpid()\nclass FromWorker: pass"), a)
same(on_each(lambda: zz), [1, 1])
same(type(sd.remotecall_fetch(lambda: FromWorker(), b)), FromWorker)
theirs = on_each(os.getpid)
same(on_each(lambda: mine), theirs)
# clear, memory
sd.everywhere("big = [0] * 10\nimport numpy as np; arr2 = np.zeros(10)")
sd.clear("big", pids)
same(on_each(lambda: big), [None, None])
# threads
def hammer(k):
    for i in range(10):
        sd.everywhere(f"t{k} = {i}\ndef tf{k}(): return t{k}")
        f = globals()[f"tf{k}"]
        same(on_each(f), [i, i])
        same(on_each(eval(f"lambda: t{k}")), [i, i])
for task in [sd.async_(hammer, k) for k in range(3)]: task.fetch()
# clusters with no all-to-all
sd.rmprocs(*pids)
same(sd.pmap(lambda i: early, [1]), [5])
pids = a, b = sd.addprocs(2, topology="master_worker")
same(on_each(lambda: early), [5, 5])
sd.everywhere("def ef(): return 'new', early_there", early_there=3)
same(on_each(ef), [('new', 3)]*2)
print("ok")
"""


@pytest.mark.parametrize("program", ["STATE", "REDEFINED", "LATER", "SORTS", "DISPATCHED", "EARLY"])
def test_definitions(program):
    assert run_script(globals()[program]).clean() == "ok\n"


def test_relative_imports(tmp_path):
    package = tmp_path / "pkg"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "tools.py").write_text("def double(x): return 2 * x\n")
    (package / "script.py").write_text(
        "import shmdist as sd\n"
        "pids = sd.addprocs(1)\n"
        "sd.everywhere('from .tools import double')\n"
        "assert sd.everywhere('double(2)', procs=pids[0]) == 4\n"
        "@sd.everywhere\n"
        "def later(x):\n"
        "    from . import tools\n"
        "    return tools.double(x)\n"
        "assert sd.remotecall_fetch(later, pids[0], 3) == 6 == later(3)\n"
        "assert sd.remotecall_eval('__main__', pids[0], 'from .tools import double as d; d(1)') == 2\n"
        "print('ok')\n"
    )
    command = [sys.executable, "-m", "pkg.script"]
    assert Script(command=command, cwd=tmp_path).end().clean() == "ok\n"

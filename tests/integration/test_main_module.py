"""On a worker the program's classes and functions are found by their names, as pickle and others look for them."""

from tests.integration.helpers import run_script

BEGIN = """
import concurrent.futures, dataclasses, enum, multiprocessing, os, pickle, sys, threading, typing, warnings
import shmdist as sd
@dataclasses.dataclass
class Result:
    x: int
class Color(enum.Enum): RED = 1
class MyError(Exception): pass
class Config:
    one: "Result"
    many: "list[Result]"
    alias: "Vector"
    maybe: "typing.Optional[Later]" = None
Vector = list[float]
LIMIT = 7
table = {"a": 1}
def square(x): return x * x
def double(r): return Result(2 * r.x)
def fail(x): raise MyError(x)
def same(one, other): assert one == other, (one, other)
def main(name):
    import __main__
    return getattr(__main__, name)
def why(name):
    try: main(name)
    except AttributeError as error: return str(error)
    raise AssertionError("it is there")
def none_of(name): return f"module '__main__' has no attribute {name!r}"
a, b = sd.addprocs(2)
"""

NAMES = (
    BEGIN
    + """
class Later: pass
def there_and_back(i): return pickle.loads(pickle.dumps(Result(i)))
def load(data): return pickle.loads(data)
def is_one_class():
    return main("Result") is Result and type(there_and_back(1)) is Result
def hints(kind): return typing.get_type_hints(kind)
for _ in range(2):
    for size in (None, 1, 5):
        same(sd.pmap(there_and_back, range(3), batch_size=size), [Result(i) for i in range(3)])
    same(sd.remotecall(there_and_back, a, 1).fetch(), Result(1))
    same(list(sd.pgenerate(there_and_back, [1])), [Result(1)])
    same(sd.remotecall_fetch(lambda: sd.remotecall_fetch(there_and_back, b, 1), a), Result(1))
    same(sd.remotecall_fetch(load, a, pickle.dumps(Result(5))), Result(5))
    assert sd.remotecall_fetch(load, a, pickle.dumps(Color.RED)) is Color.RED
    same(sd.remotecall_fetch(lambda data: load(data)(3), a, pickle.dumps(square)), 9)
    assert sd.remotecall_fetch(is_one_class, a)
    same(sd.remotecall_fetch(hints, a, Config), typing.get_type_hints(Config))
same(sd.remotecall_fetch(lambda: [hasattr(sys.modules["__main__"], "nothing") for _ in range(9999)][-1], a), False)
same(sd.remotecall_fetch(why, a, "later"), none_of("later"))
def later(): return 1
same(sd.remotecall_fetch(lambda: main("later")(), a), 1)
def later(): return 2
same(sd.remotecall_fetch(lambda: main("later")(), a), 2)
same(sd.remotecall_fetch(main, a, "LIMIT"), 7)
LIMIT = 8
same(sd.remotecall_fetch(main, a, "LIMIT"), 8)
text = sd.remotecall_fetch(why, a, "table")
assert "dict, which can change; pass it as an argument" in text, text
same(sd.remotecall_fetch(why, a, "__file__"), none_of("__file__"))
lock = threading.Lock()
class Unsendable: held = lock
text = sd.remotecall_fetch(why, a, "Unsendable")
assert "process 1 cannot send 'Unsendable'" in text and "lock" in text, text
class Single:
    def __reduce__(self): return "SINGLE"
SINGLE = Single()  # its own pickle is its name
try: sd.remotecall_fetch(bool, a, SINGLE)
except AttributeError as error: pass
else: raise AssertionError("arrived")
future = sd.remotecall(there_and_back, a, 3)
while not future.isready(): sum(range(1000))  # process 1 works, and answers
same(future.fetch(), Result(3))
sd.everywhere("class Own: pass\\ndef make(): return pickle.loads(pickle.dumps(Own()))\\nimport pickle")
for pid in (a, b):
    same(type(sd.everywhere("make()", procs=pid)), Own)
    assert sd.remotecall_fetch(lambda: type(pickle.loads(pickle.dumps(Own()))) is Own, pid)
    same(sd.everywhere("__import__('__main__').square(3)", procs=pid), 9)
    same(sd.remotecall_fetch(lambda: sys.modules["__main__"], pid), sys.modules["__main__"])
print("ok")
"""
)

FORKED = (
    BEGIN
    + """
warnings.simplefilter("ignore", DeprecationWarning)  # threads and fork, from 3.12 on
context = multiprocessing.get_context("fork")
def pool(i):
    with context.Pool(2) as p: return p.map(square, range(3))
def pool_of_argument(r):
    function = main("double")
    with context.Pool(2) as p: return p.map(function, [r, r])
def pool_that_fails(i):
    with context.Pool(1) as p:
        try: p.map(fail, [1])
        except MyError as error: return "caught"
def pool_of_new_processes(i):
    with context.Pool(1, maxtasksperchild=1) as p: return p.map(square, range(3), chunksize=1)
def executor(i):
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=context) as e: return list(e.map(square, range(3)))
def asked_in_child(name):
    r, w = os.pipe()
    if not (pid := os.fork()):
        try: os.write(w, why(name).encode())
        finally: os._exit(0)
    os.waitpid(pid, 0)
    return os.read(r, 999).decode()
def silently(i):
    warnings.simplefilter("ignore", DeprecationWarning)
for pid in (a, b): sd.remotecall_wait(silently, pid, 0)
same(sd.pmap(pool, [1, 2]), [[0, 1, 4]] * 2)
same(sd.remotecall_fetch(pool_of_argument, a, Result(2)), [Result(4)] * 2)
same(sd.remotecall_fetch(pool_that_fails, a, 1), "caught")
same(sd.remotecall_fetch(pool_of_new_processes, a, 1), [0, 1, 4])
same(sd.remotecall_fetch(executor, a, 1), [0, 1, 4])
same(sd.remotecall_fetch(asked_in_child, a, "nothing"),
     none_of("nothing") + " (this process was forked by a worker, and cannot ask process 1)")
print("ok")
"""
)


def test_names():
    assert run_script(NAMES).clean() == "ok\n"


def test_in_forked_processes():
    assert run_script(FORKED).clean() == "ok\n"

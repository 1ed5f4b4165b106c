/* A batch of elements of a map: the loop of `shmdist.scheduling.batch`, which says what it must keep to. */
#include <Python.h>
#include <stdint.h>
#include <time.h>

/* The time, coarsely: it changes every few milliseconds. */
static uint64_t tick(void) {
    struct timespec now;
#ifdef CLOCK_MONOTONIC_COARSE
    clock_gettime(CLOCK_MONOTONIC_COARSE, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
#else
    clock_gettime(CLOCK_MONOTONIC, &now);
    return ((uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec) >> 22;
#endif
}

static PyObject *call(PyObject *f, int star, PyObject *element) {
    if (!star)
        return PyObject_CallFunctionObjArgs(f, element, NULL);
    if (PyTuple_Check(element))
        return PyObject_Call(f, element, NULL);
    PyObject *arguments = PySequence_Tuple(element);
    PyObject *value = arguments == NULL ? NULL : PyObject_Call(f, arguments, NULL);
    Py_XDECREF(arguments);
    return value;
}

/* advance(f, star, source, values, numbers, index, limit): append f of the elements of `source` to
 * `values` until there are `limit` of these, or for some milliseconds. The number of the element that
 * is begun is in numbers[index]. True: the source is at its end. An error of f's is raised as it is.
 *
 * It comes back every few milliseconds, for only between bytecodes do signals, exceptions from other
 * threads and requests for the interpreter get their turn. */
static PyObject *advance(PyObject *module, PyObject *const *args, Py_ssize_t count) {
    if (count != 7 || !PyList_Check(args[3]) || !PyIter_Check(args[2])) {
        PyErr_SetString(PyExc_TypeError, "advance(f, star, source, values, numbers, index, limit)");
        return NULL;
    }
    PyObject *f = args[0], *source = args[2], *values = args[3];
    int star = PyObject_IsTrue(args[1]);
    Py_ssize_t index = PyLong_AsSsize_t(args[5]), limit = PyLong_AsSsize_t(args[6]);
    Py_buffer numbers;
    if (PyErr_Occurred() || PyObject_GetBuffer(args[4], &numbers, PyBUF_WRITABLE))
        return NULL;
    if (index < 0 || index >= numbers.len / 8) {
        PyBuffer_Release(&numbers);
        PyErr_SetString(PyExc_IndexError, "there is no such number");
        return NULL;
    }
    uint64_t *begun = (uint64_t *)numbers.buf + index, start = tick();
    Py_ssize_t done = PyList_Size(values);
    PyObject *outcome = Py_False;
    while (done < limit) {
        PyObject *element = PyIter_Next(source);
        if (element == NULL) {
            outcome = PyErr_Occurred() ? NULL : Py_True;
            break;
        }
        __atomic_store_n(begun, (uint64_t)done, __ATOMIC_RELAXED);
        PyObject *value = call(f, star, element);
        Py_DECREF(element);
        if (value == NULL || PyList_Append(values, value)) {
            Py_XDECREF(value);
            outcome = NULL;
            break;
        }
        Py_DECREF(value);
        done = PyList_Size(values);
        if (tick() != start)
            break;
    }
    PyBuffer_Release(&numbers);
    return Py_XNewRef(outcome);
}

/* begin(numbers, word, apart, call): raise numbers[word] to `call`, then tell whether numbers[word + apart]
 * is below it. What for, `shmdist.memory.progress_page` says. */
static PyObject *begin(PyObject *module, PyObject *const *args, Py_ssize_t count) {
    if (count != 4) {
        PyErr_SetString(PyExc_TypeError, "begin(numbers, word, apart, call)");
        return NULL;
    }
    Py_ssize_t word = PyLong_AsSsize_t(args[1]), apart = PyLong_AsSsize_t(args[2]);
    uint64_t number = PyLong_AsUnsignedLongLong(args[3]);
    Py_buffer numbers;
    if (PyErr_Occurred() || PyObject_GetBuffer(args[0], &numbers, PyBUF_WRITABLE))
        return NULL;
    if (word < 0 || apart < 0 || word + apart >= numbers.len / 8) {
        PyBuffer_Release(&numbers);
        PyErr_SetString(PyExc_IndexError, "there is no such number");
        return NULL;
    }
    uint64_t *begun = (uint64_t *)numbers.buf + word;
    if (__atomic_load_n(begun, __ATOMIC_RELAXED) < number) /* whoever else raises it waits for the interpreter */
        __atomic_store_n(begun, number, __ATOMIC_RELAXED);
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    int mine = __atomic_load_n(begun + apart, __ATOMIC_RELAXED) < number;
    PyBuffer_Release(&numbers);
    return PyBool_FromLong(mine);
}

/* kinds(items): the set of the types of a list's objects. */
static PyObject *kinds(PyObject *module, PyObject *items) {
    if (!PyList_Check(items)) {
        PyErr_SetString(PyExc_TypeError, "kinds(items): items must be a list");
        return NULL;
    }
    PyObject *found = PySet_New(NULL), *last = NULL;
    for (Py_ssize_t i = 0; found != NULL && i < PyList_Size(items); i++) {
        PyObject *kind = (PyObject *)Py_TYPE(PyList_GetItem(items, i));
        if (kind != last && PySet_Add(found, kind)) /* it runs the code of a metaclass, perhaps */
            Py_CLEAR(found);
        last = kind; /* only compared */
    }
    return found;
}

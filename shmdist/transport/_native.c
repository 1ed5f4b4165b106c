/* What is in C. The slots of a ring segment stand here: the same as transport/ring_slots.py, which says what each
 * thing is for. The protocol, and which order of memory it needs, stands in transport/ring.py.
 *
 * What lies in a slot comes from another process, so each length is read once and held against
 * the room there is before it is used. Nothing here blocks or lets go of the interpreter, but
 * where an object is made.
 *
 * It keeps to the stable ABI: one build serves all versions of Python from 3.11 on. Macros such as
 * Py_RETURN_NONE are not used: the headers of 3.12 and later count no reference there, and what they
 * compile frees None, True and False on 3.11.
 */
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030b0000
#include <Python.h>

#include "_native_memory.h"

#include "_native_frame.h"

#include "_native_batch.h"

#ifndef SOURCE
#define SOURCE "" /* a digest of these files */
#endif

static PyTypeObject *record_type, *writer_type, *reader_type, *scanner_type;

/* ------------------------------------------------------------------ RingWriter */

typedef struct {
    PyObject_HEAD
    PyObject *memory, *fence;
    Py_buffer buffer;
    unsigned char *ring;
    uint64_t *words, *head_word, *tail_word, *seen_word;
    uint64_t head, tail;
} RingWriter;

static int writer_traverse(RingWriter *self, visitproc visit, void *arg) {
    Py_VISIT(Py_TYPE((PyObject *)self));
    Py_VISIT(self->memory);
    Py_VISIT(self->fence);
    return 0;
}

static int writer_clear(RingWriter *self) {
    Py_CLEAR(self->fence);
    return 0; /* the memory stays mapped while this can be reached */
}

static void writer_dealloc(RingWriter *self) {
    PyObject_GC_UnTrack(self);
    PyBuffer_Release(&self->buffer);
    Py_CLEAR(self->memory);
    Py_CLEAR(self->fence);
    finish((PyObject *)self);
}

static int writer_init(RingWriter *self, PyObject *args, PyObject *kwargs) {
    PyObject *memory, *number;
    int slot;
    if (self->memory != NULL || !PyArg_ParseTuple(args, "OO", &memory, &number)) {
        if (!PyErr_Occurred())
            PyErr_SetString(PyExc_RuntimeError, "it has been made already");
        return -1;
    }
    if (slot_of(number, &slot) || map(memory, &self->buffer, &self->words))
        return -1;
    self->memory = Py_NewRef(memory);
    self->ring = (unsigned char *)self->buffer.buf + page + (Py_ssize_t)slot * RING;
    self->head_word = self->words + HEADS + slot;
    self->tail_word = self->words + TAILS + slot;
    self->seen_word = self->words + SEEN + slot;
    self->head = load(self->head_word) & ~(uint64_t)7; /* whoever wrote it */
    self->tail = load(self->tail_word);
    return 0;
}

/* Leave bytes; the outcome, or -1. */
static long leave(RingWriter *self, const void *data, uint64_t size, uint64_t sent) {
    if (self->memory == NULL || load(self->seen_word) != sent || size > MOST)
        return REFUSED;
    uint64_t head = self->head, at = head & (RING - 1), end = head + whole(size);
    int over = at + size + 8 > RING;
    if (over)
        end += RING - at;
    if (end - self->tail > RING) {
        self->tail = load(self->tail_word);
        if (end - self->tail > RING)
            return REFUSED;
    }
    if (over) {
        store((uint64_t *)(self->ring + at), 0);
        at = 0;
    }
    memcpy(self->ring + at + 8, data, size);
    store((uint64_t *)(self->ring + at), size);
    if (self->fence != NULL && fence(self->fence)) /* a release needs none */
        return -1;
    self->head = end;
    store(self->head_word, end);
    if (fence(self->fence))
        return -1;
    return load(self->words + AWAKE) ? LEFT : UNSEEN;
}

static PyObject *writer_put(RingWriter *self, PyObject *const *args, Py_ssize_t count) {
    if (count != 2) {
        PyErr_SetString(PyExc_TypeError, "put(data, sent)");
        return NULL;
    }
    uint64_t sent = PyLong_AsUnsignedLongLong(args[1]);
    if (sent == (uint64_t)-1 && PyErr_Occurred())
        return NULL;
    long outcome;
    if (PyBytes_CheckExact(args[0])) {
        outcome = leave(self, PyBytes_AsString(args[0]), (uint64_t)PyBytes_Size(args[0]), sent);
    } else {
        Py_buffer data;
        if (PyObject_GetBuffer(args[0], &data, PyBUF_SIMPLE))
            return NULL;
        outcome = leave(self, data.buf, (uint64_t)data.len, sent);
        PyBuffer_Release(&data);
    }
    return outcome < 0 ? NULL : PyLong_FromLong(outcome);
}

static PyMethodDef writer_methods[] = {
    {"put", (PyCFunction)(void (*)(void))writer_put, METH_FASTCALL, NULL},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef writer_members[] = {
    {"fence", T_OBJECT, offsetof(RingWriter, fence), 0, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot writer_slots[] = {
    {Py_tp_traverse, writer_traverse}, {Py_tp_clear, writer_clear},     {Py_tp_dealloc, writer_dealloc},
    {Py_tp_init, writer_init},         {Py_tp_methods, writer_methods}, {Py_tp_members, writer_members},
    {0, NULL},
};

static PyType_Spec writer_spec = {
    "shmdist.transport._native.RingWriter", sizeof(RingWriter), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC, writer_slots,
};

/* ------------------------------------------------------------------ RingReader */

typedef struct {
    PyObject_HEAD
    PyObject *memory, *link;
    Py_buffer buffer;
    unsigned char *ring;
    uint64_t *head_word, *tail_word, *seen_word;
    uint64_t tail, next;
    int slot;
} RingReader;

static int reader_traverse(RingReader *self, visitproc visit, void *arg) {
    Py_VISIT(Py_TYPE((PyObject *)self));
    Py_VISIT(self->memory);
    Py_VISIT(self->link);
    return 0;
}

static int reader_clear(RingReader *self) {
    Py_CLEAR(self->link);
    return 0; /* the memory stays mapped while this can be reached */
}

static void reader_dealloc(RingReader *self) {
    PyObject_GC_UnTrack(self);
    PyBuffer_Release(&self->buffer);
    Py_CLEAR(self->memory);
    Py_CLEAR(self->link);
    finish((PyObject *)self);
}

static int reader_init(RingReader *self, PyObject *args, PyObject *kwargs) {
    PyObject *memory, *number, *link;
    uint64_t *words;
    if (self->memory != NULL || !PyArg_ParseTuple(args, "OOO", &memory, &number, &link)) {
        if (!PyErr_Occurred())
            PyErr_SetString(PyExc_RuntimeError, "it has been made already");
        return -1;
    }
    if (slot_of(number, &self->slot) || map(memory, &self->buffer, &words))
        return -1;
    self->memory = Py_NewRef(memory);
    self->link = Py_NewRef(link);
    self->ring = (unsigned char *)self->buffer.buf + page + (Py_ssize_t)self->slot * RING;
    self->head_word = words + HEADS + self->slot;
    self->tail_word = words + TAILS + self->slot;
    self->seen_word = words + SEEN + self->slot;
    self->tail = self->next = load(self->head_word) & ~(uint64_t)7; /* whoever wrote it */
    store(self->tail_word, self->tail);
    return 0;
}

/* Find the message at `*tail`: its bytes and their number, and move `*tail` behind it.
 * 1: found; 0: there is none before `head`; -1: what lies there makes no sense. */
static int next_message(RingReader *self, uint64_t *tail, uint64_t head, unsigned char **found, uint64_t *found_size) {
    uint64_t room = head - self->tail; /* all of it lies in the ring, and nothing lies beyond it */
    if (room > RING)
        return -1;
    while (*tail != head) {
        uint64_t at = *tail & (RING - 1);
        uint64_t size = load((uint64_t *)(self->ring + at));
        uint64_t behind = *tail + (size ? whole(size) : RING - at);
        if (size > MOST || at + 8 + size > RING || behind - self->tail > room)
            return -1;
        *tail = behind;
        if (size) {
            *found = self->ring + at + 8;
            *found_size = size;
            return 1;
        }
    }
    return 0;
}

static PyObject *reader_open(RingReader *self, PyObject *unused) {
    PyObject *found = PyList_New(0);
    if (found == NULL || self->memory == NULL)
        return found;
    uint64_t head = load(self->head_word), tail = self->tail, size;
    unsigned char *data;
    int more;
    while ((more = next_message(self, &tail, head, &data, &size)) > 0) {
        PyObject *message = PyBytes_FromStringAndSize((const char *)data, (Py_ssize_t)size);
        if (message == NULL || PyList_Append(found, message)) {
            Py_XDECREF(message);
            Py_DECREF(found);
            return NULL;
        }
        Py_DECREF(message);
    }
    if (more < 0) {
        Py_DECREF(found);
        PyErr_SetString(PyExc_OSError, "what a process left in the ring segment makes no sense");
        return NULL;
    }
    self->next = tail;
    return found;
}

static void take_room_back(RingReader *self) {
    if (self->next != self->tail) {
        self->tail = self->next;
        store(self->tail_word, self->tail);
    }
}

static PyObject *reader_done(RingReader *self, PyObject *unused) {
    take_room_back(self);
    return Py_NewRef(Py_None);
}

static PyObject *reader_seen(RingReader *self, PyObject *number) {
    uint64_t received = PyLong_AsUnsignedLongLong(number);
    if (received == (uint64_t)-1 && PyErr_Occurred())
        return NULL;
    if (self->memory != NULL)
        store(self->seen_word, received);
    return Py_NewRef(Py_None);
}

/* Append the frames that lie here, while each message is one short, whole frame.
 * 1: nothing is left; 0: something is, for Python to open; -1: an error. */
static int reader_take(RingReader *self, PyObject *frames) {
    uint64_t head = load(self->head_word), tail = self->tail, size;
    unsigned char *data;
    int more;
    while ((more = next_message(self, &tail, head, &data, &size)) > 0) {
        if (size < HEADER || u32(data + NBUF) || u64(data + BODY) != size - HEADER) {
            more = -1;
            break;
        }
        PyObject *frame = make_frame(data, (Py_ssize_t)size - HEADER, self->link);
        if (frame == NULL)
            return -1; /* it still lies there */
        if (PyList_Append(frames, frame)) {
            Py_DECREF(frame);
            return -1;
        }
        Py_DECREF(frame);
        self->next = tail;
        take_room_back(self);
    }
    if (more == 0) {
        self->next = tail;
        take_room_back(self);
    }
    return more == 0;
}

static PyMethodDef reader_methods[] = {
    {"open", (PyCFunction)reader_open, METH_NOARGS, NULL},
    {"done", (PyCFunction)reader_done, METH_NOARGS, NULL},
    {"seen", (PyCFunction)reader_seen, METH_O, NULL},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef reader_members[] = {
    {"link", T_OBJECT, offsetof(RingReader, link), READONLY, NULL},
    {"slot", T_INT, offsetof(RingReader, slot), READONLY, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot reader_slots[] = {
    {Py_tp_traverse, reader_traverse}, {Py_tp_clear, reader_clear},     {Py_tp_dealloc, reader_dealloc},
    {Py_tp_init, reader_init},         {Py_tp_methods, reader_methods}, {Py_tp_members, reader_members},
    {0, NULL},
};

static PyType_Spec reader_spec = {
    "shmdist.transport._native.RingReader", sizeof(RingReader), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC, reader_slots,
};

/* ------------------------------------------------------------------ RingScanner */

typedef struct {
    PyObject_HEAD
    PyObject *memory, *fence, *receivers;
    Py_buffer buffer;
    uint64_t *words;
    int count; /* of slots up to the last in use */
    uint64_t looked[SLOTS];
} RingScanner;

static int scanner_traverse(RingScanner *self, visitproc visit, void *arg) {
    Py_VISIT(Py_TYPE((PyObject *)self));
    Py_VISIT(self->memory);
    Py_VISIT(self->fence);
    Py_VISIT(self->receivers);
    return 0;
}

static int scanner_clear(RingScanner *self) {
    Py_CLEAR(self->fence);
    Py_CLEAR(self->receivers);
    return 0;
}

static void scanner_dealloc(RingScanner *self) {
    PyObject_GC_UnTrack(self);
    PyBuffer_Release(&self->buffer);
    Py_CLEAR(self->memory);
    scanner_clear(self);
    finish((PyObject *)self);
}

static int scanner_init(RingScanner *self, PyObject *args, PyObject *kwargs) {
    PyObject *memory;
    if (self->memory != NULL || !PyArg_ParseTuple(args, "O", &memory)) {
        if (!PyErr_Occurred())
            PyErr_SetString(PyExc_RuntimeError, "it has been made already");
        return -1;
    }
    if (map(memory, &self->buffer, &self->words))
        return -1;
    self->memory = Py_NewRef(memory);
    self->receivers = PyTuple_New(0);
    return self->receivers == NULL ? -1 : 0;
}

/* Put the receivers that are not `without`, and `with` at their end, in the place of what there is.
 * A thread that goes through the old ones keeps them. */
static PyObject *change(RingScanner *self, PyObject *without, PyObject *with) {
    Py_ssize_t count = PyTuple_Size(self->receivers);
    PyObject *list = PyList_New(0);
    if (list == NULL)
        return NULL;
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *each = PyTuple_GetItem(self->receivers, i);
        if (each != without && PyList_Append(list, each))
            goto failed;
    }
    if (with != NULL && PyList_Append(list, with))
        goto failed;
    PyObject *changed = PyList_AsTuple(list), *before = self->receivers;
    if (changed == NULL)
        goto failed;
    Py_DECREF(list);
    self->receivers = changed;
    Py_DECREF(before);
    return Py_NewRef(Py_None);
failed:
    Py_DECREF(list);
    return NULL;
}

static int is_receiver(PyObject *object) {
    if (Py_TYPE(object) == reader_type && ((RingReader *)object)->memory && ((RingReader *)object)->link)
        return 1;
    PyErr_SetString(PyExc_TypeError, "it must be a RingReader");
    return 0;
}

static int is_made(RingScanner *self) {
    if (self->receivers != NULL)
        return 1;
    PyErr_SetString(PyExc_RuntimeError, "it has not been made: RingScanner.__init__ comes first");
    return 0;
}

static PyObject *scanner_add(RingScanner *self, PyObject *receiver) {
    if (!is_made(self) || !is_receiver(receiver))
        return NULL;
    PyObject *done = change(self, NULL, receiver);
    if (done != NULL && self->count <= ((RingReader *)receiver)->slot) {
        int before = self->count;
        self->count = ((RingReader *)receiver)->slot + 1;
        for (int i = before; i < self->count; i++)
            self->looked[i] = ~load(self->words + HEADS + i); /* to be looked at once, whatever it is */
    }
    return done;
}

static PyObject *scanner_remove(RingScanner *self, PyObject *receiver) {
    return is_made(self) ? change(self, receiver, NULL) : NULL;
}

static PyObject *scanner_mark_awake(RingScanner *self, PyObject *unused) {
    if (!is_made(self))
        return NULL;
    store(self->words + AWAKE, 1);
    return Py_NewRef(Py_None);
}

static int has_new(RingScanner *self) {
    for (int i = 0; i < self->count; i++)
        if (load(self->words + HEADS + i) != self->looked[i])
            return 1;
    return 0;
}

static PyObject *scanner_mark_asleep(RingScanner *self, PyObject *unused) {
    if (!is_made(self))
        return NULL;
    store(self->words + AWAKE, 0);
    if (fence(self->fence))
        return NULL;
    return PyBool_FromLong(has_new(self));
}

static PyObject *scanner_has_new(RingScanner *self, PyObject *unused) {
    if (!is_made(self))
        return NULL;
    return PyBool_FromLong(has_new(self));
}

static PyObject *scanner_spin(RingScanner *self, PyObject *unused) {
    if (!is_made(self))
        return NULL;
    for (int i = 0; i < LOOKS; i++) {
        if (has_new(self))
            return Py_NewRef(Py_True);
        relax();
    }
    return Py_NewRef(Py_False);
}

static PyObject *scanner_take(RingScanner *self, PyObject *frames) {
    if (!is_made(self))
        return NULL;
    if (!PyList_Check(frames) || frame_type == NULL) {
        PyErr_SetString(PyExc_TypeError, "take(frames): frames must be a list");
        return NULL;
    }
    for (int i = 0; i < self->count; i++)
        self->looked[i] = load(self->words + HEADS + i);
    PyObject *left = PyList_New(0), *receivers = Py_NewRef(self->receivers);
    Py_ssize_t count = PyTuple_Size(receivers);
    for (Py_ssize_t i = 0; left != NULL && i < count; i++) {
        RingReader *each = (RingReader *)PyTuple_GetItem(receivers, i);
        if (load(each->head_word) == each->tail)
            continue;
        int outcome = reader_take(each, frames);
        if (outcome < 0)
            PyErr_Clear(); /* no memory: that Python meets again, and ends the link */
        if (outcome < 1 && PyList_Append(left, (PyObject *)each))
            Py_CLEAR(left);
    }
    Py_DECREF(receivers);
    return left;
}

static PyMethodDef scanner_methods[] = {
    {"add", (PyCFunction)scanner_add, METH_O, NULL},
    {"remove", (PyCFunction)scanner_remove, METH_O, NULL},
    {"mark_awake", (PyCFunction)scanner_mark_awake, METH_NOARGS, NULL},
    {"mark_asleep", (PyCFunction)scanner_mark_asleep, METH_NOARGS, NULL},
    {"has_new", (PyCFunction)scanner_has_new, METH_NOARGS, NULL},
    {"spin", (PyCFunction)scanner_spin, METH_NOARGS, NULL},
    {"take", (PyCFunction)scanner_take, METH_O, NULL},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef scanner_members[] = {
    {"fence", T_OBJECT, offsetof(RingScanner, fence), 0, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot scanner_slots[] = {
    {Py_tp_traverse, scanner_traverse}, {Py_tp_clear, scanner_clear},     {Py_tp_dealloc, scanner_dealloc},
    {Py_tp_init, scanner_init},         {Py_tp_methods, scanner_methods}, {Py_tp_members, scanner_members},
    {0, NULL},
};

static PyType_Spec scanner_spec = {
    "shmdist.transport._native.RingScanner", sizeof(RingScanner), 0,
    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC, scanner_slots,
};

/* ------------------------------------------------------------------ module */

static PyObject *settle(PyObject *module, PyObject *args) {
    Py_ssize_t size;
    PyObject *type;
    if (!PyArg_ParseTuple(args, "nO", &size, &type))
        return NULL;
    if (size < (SEEN + SLOTS) * 8 || !PyType_Check(type) || !PyType_IsSubtype((PyTypeObject *)type, record_type)) {
        PyErr_SetString(PyExc_TypeError, "settle(page, Frame): Frame must be a kind of Record");
        return NULL;
    }
    Py_INCREF(type);
    Py_XDECREF((PyObject *)frame_type);
    frame_type = (PyTypeObject *)type;
    page = size;
    return Py_NewRef(Py_None);
}

static PyMethodDef functions[] = {
    {"settle", settle, METH_VARARGS, NULL},
    {"advance", (PyCFunction)(void (*)(void))advance, METH_FASTCALL, NULL},
    {"begin", (PyCFunction)(void (*)(void))begin, METH_FASTCALL, NULL},
    {"kinds", kinds, METH_O, NULL},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "shmdist.transport._native", NULL, -1, functions, NULL, NULL, NULL, NULL,
};

static PyTypeObject *enter(PyObject *module, const char *name, PyType_Spec *spec) {
    PyObject *type = PyType_FromSpec(spec);
    if (type == NULL || PyModule_AddObjectRef(module, name, type)) {
        Py_XDECREF(type);
        return NULL;
    }
    return (PyTypeObject *)type; /* the reference is this file's, for good */
}

PyMODINIT_FUNC PyInit__native(void) {
    PyObject *module = PyModule_Create(&definition);
    if (module == NULL)
        return NULL;
    PyObject *layout = Py_BuildValue("(iiiiii)", SLOTS, RING, MOST, REFUSED, LEFT, UNSEEN);
    if (layout == NULL || PyModule_AddObjectRef(module, "LAYOUT", layout) ||
        PyModule_AddStringConstant(module, "SOURCE", SOURCE) ||
        !(record_type = enter(module, "Record", &record_spec)) ||
        !(writer_type = enter(module, "RingWriter", &writer_spec)) ||
        !(reader_type = enter(module, "RingReader", &reader_spec)) ||
        !(scanner_type = enter(module, "RingScanner", &scanner_spec))) {
        Py_XDECREF(layout);
        Py_DECREF(module);
        return NULL;
    }
    Py_DECREF(layout);
    return module;
}

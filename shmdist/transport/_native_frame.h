/* Frames: what transport.messages.Frame consists of, and how one is made of what lies in a ring segment. */
#include <Python.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <structmember.h>

static PyTypeObject *frame_type; /* transport.messages.Frame, a subclass of Record; set by settle() */

typedef struct {
    PyObject_HEAD
    PyObject *kind, *flags, *lane, *call_id, *body, *buffers, *link;
} Record;

static int record_traverse(Record *self, visitproc visit, void *arg) {
    Py_VISIT(Py_TYPE((PyObject *)self));
    Py_VISIT(self->body);
    Py_VISIT(self->buffers);
    Py_VISIT(self->link);
    return 0;
}

static int record_clear(Record *self) {
    Py_CLEAR(self->kind);
    Py_CLEAR(self->flags);
    Py_CLEAR(self->lane);
    Py_CLEAR(self->call_id);
    Py_CLEAR(self->body);
    Py_CLEAR(self->buffers);
    Py_CLEAR(self->link);
    return 0;
}

static void record_dealloc(Record *self) {
    PyObject_GC_UnTrack(self);
    record_clear(self);
    finish((PyObject *)self);
}

static int record_init(Record *self, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"kind", "flags", "lane", "call_id", "body", "buffers", NULL};
    PyObject *kind, *flags, *lane, *call_id, *body, *buffers;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOOOOO", names, &kind, &flags, &lane, &call_id, &body, &buffers))
        return -1;
    record_clear(self);
    self->kind = Py_NewRef(kind);
    self->flags = Py_NewRef(flags);
    self->lane = Py_NewRef(lane);
    self->call_id = Py_NewRef(call_id);
    self->body = Py_NewRef(body);
    self->buffers = Py_NewRef(buffers);
    self->link = Py_NewRef(Py_None);
    return 0;
}

static PyMemberDef record_members[] = {
    {"kind", T_OBJECT_EX, offsetof(Record, kind), 0, NULL},
    {"flags", T_OBJECT_EX, offsetof(Record, flags), 0, NULL},
    {"lane", T_OBJECT_EX, offsetof(Record, lane), 0, NULL},
    {"call_id", T_OBJECT_EX, offsetof(Record, call_id), 0, NULL},
    {"body", T_OBJECT_EX, offsetof(Record, body), 0, NULL},
    {"buffers", T_OBJECT_EX, offsetof(Record, buffers), 0, NULL},
    {"link", T_OBJECT_EX, offsetof(Record, link), 0, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot record_slots[] = {
    {Py_tp_traverse, record_traverse}, {Py_tp_clear, record_clear}, {Py_tp_dealloc, record_dealloc},
    {Py_tp_init, record_init},         {Py_tp_members, record_members}, {0, NULL},
};

static PyType_Spec record_spec = {
    "shmdist.transport._native.Record", sizeof(Record), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC,
    record_slots,
};

/* Make a Frame of a whole one without buffers, whose body has `size` bytes. */
static PyObject *make_frame(const unsigned char *at, Py_ssize_t size, PyObject *link) {
    allocfunc allocate = (allocfunc)PyType_GetSlot(frame_type, Py_tp_alloc);
    Record *self = (Record *)allocate(frame_type, 0);
    if (self == NULL)
        return NULL;
    self->kind = PyLong_FromLong(at[KIND]);
    self->flags = PyLong_FromLong(at[FLAGS]);
    self->lane = PyLong_FromUnsignedLong(u32(at + LANE));
    self->call_id = PyLong_FromUnsignedLongLong(u64(at + CALL_ID));
    self->body = PyBytes_FromStringAndSize((const char *)at + HEADER, size);
    self->buffers = PyList_New(0);
    self->link = Py_NewRef(link);
    if (!self->kind || !self->flags || !self->lane || !self->call_id || !self->body || !self->buffers) {
        Py_DECREF(self);
        return NULL;
    }
    return (PyObject *)self;
}

/* The memory of a ring segment: where what lies, and how its words are read and written. */
#include <Python.h>
#include <stdint.h>
#include <string.h>

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "frames are little-endian; transport/ring_slots.py serves here"
#endif

enum { SLOTS = 64, RING = 1 << 16, MOST = RING / 4, AWAKE = 0, HEADS = 8, TAILS = HEADS + SLOTS, SEEN = TAILS + SLOTS };
enum { REFUSED = 0, LEFT = 1, UNSEEN = 2 };
enum { LOOKS = 256 }; /* of `watch`: some microseconds */

/* transport/messages.py: kind u8 | flags u8 | spare u16 | lane u32 | nbuf u32 | call_id u64 | body u64 */
enum { KIND = 0, FLAGS = 1, LANE = 4, NBUF = 8, CALL_ID = 12, BODY = 20, HEADER = 28 };

static Py_ssize_t page;          /* bytes before the first slot; set by settle() */

static uint64_t load(const uint64_t *word) { return __atomic_load_n(word, __ATOMIC_ACQUIRE); }
static void store(uint64_t *word, uint64_t value) { __atomic_store_n(word, value, __ATOMIC_RELEASE); }

static uint32_t u32(const unsigned char *at) {
    uint32_t value;
    memcpy(&value, at, sizeof value);
    return value;
}

static uint64_t u64(const unsigned char *at) {
    uint64_t value;
    memcpy(&value, at, sizeof value);
    return value;
}

static uint64_t whole(uint64_t size) { return (size + 15) & ~(uint64_t)7; }

static void relax(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* A fence; then what a test wants to happen there. */
static int fence(PyObject *then) {
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    if (then == NULL || then == Py_None)
        return 0;
    Py_INCREF(then); /* it may put another one in its place */
    PyObject *nothing = PyObject_CallNoArgs(then);
    Py_DECREF(then);
    Py_XDECREF(nothing);
    return nothing == NULL ? -1 : 0;
}

/* Get the bytes of a ring segment out of the object that has it mapped. */
static int map(PyObject *memory, Py_buffer *buffer, uint64_t **words) {
    if (page == 0) {
        PyErr_SetString(PyExc_RuntimeError, "settle() comes first");
        return -1;
    }
    PyObject *view = PyObject_GetAttrString(memory, "view");
    if (view == NULL)
        return -1;
    int failed = PyObject_GetBuffer(view, buffer, PyBUF_WRITABLE);
    Py_DECREF(view);
    if (failed)
        return -1;
    if (buffer->len < page + (Py_ssize_t)SLOTS * RING) {
        PyBuffer_Release(buffer);
        PyErr_SetString(PyExc_ValueError, "that is too small for a ring segment");
        return -1;
    }
    *words = buffer->buf;
    return 0;
}

static int slot_of(PyObject *number, int *slot) {
    long value = PyLong_AsLong(number);
    if (value == -1 && PyErr_Occurred())
        return -1;
    if (value < 0 || value >= SLOTS) {
        PyErr_SetString(PyExc_ValueError, "there is no such slot");
        return -1;
    }
    *slot = (int)value;
    return 0;
}

static void finish(PyObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(self);
    Py_DECREF(type);
}

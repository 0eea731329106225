/* Injects failures of system calls below libc: LD_PRELOAD it, then arm one by memofault_arm (see faults.py).
 *
 * A call counts if it is about a file below the root that was armed, or, of mmap and madvise, about memory of no file.
 * While armed, flushes that do not fail are not made at all: these tests cut no power, and disks are slow.
 */
#define _GNU_SOURCE
#undef _FILE_OFFSET_BITS
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { ONCE = 0, FOR_EVER = 1, HALF = 2, KILL_AFTER = 3 };

static char root[PATH_MAX], wanted[32];
static size_t root_length;
static int number, kind;
static long at;
static atomic_int armed;
static atomic_long seen, made;

static const char *const names[] = {"write", "read", "fsync", "fdatasync", "syncfs", "msync", "mmap", "madvise",
                                    "collapse", "populate", "advise", "fallocate", "truncate", "open", "rename",
                                    "unlink", "mkdir"};
enum { NAMES = sizeof names / sizeof *names };
static atomic_long tally[NAMES];

/* Fail the nth call (from 1 on) of this name with this errno; kind as in the enumeration above. */
void memofault_arm(const char *below, const char *call, long nth, int error, int mode) {
    snprintf(root, sizeof root, "%s", below);
    snprintf(wanted, sizeof wanted, "%s", call);
    root_length = strlen(root);
    number = error, kind = mode, at = nth;
    atomic_store(&seen, 0), atomic_store(&made, 0);
    for (int i = 0; i < NAMES; i++) atomic_store(&tally[i], 0);
    atomic_store(&armed, 1);
}

/* Stop; return how many calls were hit. */
long memofault_disarm(void) {
    atomic_store(&armed, 0);
    return atomic_load(&made);
}

/* How many calls of a name were counted since anything was armed. */
long memofault_seen(const char *call) {
    for (int i = 0; i < NAMES; i++)
        if (!strcmp(call, names[i])) return atomic_load(&tally[i]);
    return -1;
}

static int below(const char *path) { return path && !strncmp(path, root, root_length); }

static int of_store(int fd) {
    char link[64], target[PATH_MAX];
    if (fd < 0) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, target, sizeof target - 1);
    if (n < 0) return 0;
    target[n] = 0;
    return below(target);
}

/* The interpreter's own memory does not count: CPython's Thread.start waits for ever for a thread that got none. */
static int by_interpreter(void *caller) {
    Dl_info info;
    if (!dladdr(caller, &info) || !info.dli_fname) return 0;
    const char *name = strrchr(info.dli_fname, '/');
    name = name ? name + 1 : info.dli_fname;
    return !strncmp(name, "python", 6) || !strncmp(name, "libpython", 9);
}

static int at_path(int directory, const char *path) {
    return path && path[0] != '/' && directory != AT_FDCWD ? of_store(directory) : below(path);
}

/* 0: let it be; 1: fail; 2: do half; 3: do it, and die. */
static int hit(const char *call, int counts) {
    if (!atomic_load(&armed) || !counts) return 0;
    for (int i = 0; i < NAMES; i++)
        if (!strcmp(call, names[i])) atomic_fetch_add(&tally[i], 1);
    if (strcmp(call, wanted)) return 0;
    long n = atomic_fetch_add(&seen, 1) + 1;
    if (n < at || (n > at && kind != FOR_EVER)) return 0;
    atomic_fetch_add(&made, 1);
    return kind == HALF ? 2 : kind == KILL_AFTER ? 3 : 1;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define DIE() kill(getpid(), SIGKILL)
/* A function whose calls are done wholly or not at all. */
#define WHOLE(result, name, call, counts, parameters, arguments)      \
    result name parameters {                                          \
        static __typeof__(&name) real;                                \
        if (!real) real = REAL(name);                                 \
        int what = atomic_load(&armed) ? hit(call, counts) : 0;       \
        if (what == 1 || what == 2) return errno = number, (result)-1; \
        result got = real arguments;                                  \
        if (what == 3) DIE();                                         \
        return got;                                                   \
    }
/* One that may do a part of `n` bytes. */
#define PARTIAL(name, call, type, parameters, arguments)              \
    ssize_t name parameters {                                         \
        static __typeof__(&name) real;                                \
        if (!real) real = REAL(name);                                 \
        int what = atomic_load(&armed) ? hit(call, of_store(fd)) : 0; \
        if (what == 1) return errno = number, -1;                     \
        if (what == 2 && n > 1) n /= 2;                               \
        ssize_t got = real arguments;                                 \
        if (what == 3) DIE();                                         \
        return got;                                                   \
    }
/* One of several buffers: half is what fits the first, or half of that. */
#define VECTOR(name, call, parameters, arguments)                     \
    ssize_t name parameters {                                         \
        static __typeof__(&name) real;                                \
        if (!real) real = REAL(name);                                 \
        int what = atomic_load(&armed) ? hit(call, of_store(fd)) : 0; \
        if (what == 1) return errno = number, -1;                     \
        struct iovec half = {0};                                      \
        if (what == 2 && n > 0) {                                     \
            half = v[0];                                              \
            if (n == 1 && half.iov_len > 1) half.iov_len /= 2;        \
            v = &half, n = 1;                                         \
        }                                                             \
        ssize_t got = real arguments;                                 \
        if (what == 3) DIE();                                         \
        return got;                                                   \
    }
#define FLUSH(name)                                                   \
    int name(int fd) {                                                \
        static __typeof__(&name) real;                                \
        if (!real) real = REAL(name);                                 \
        if (!atomic_load(&armed)) return real(fd);                    \
        int what = hit(#name, of_store(fd));                          \
        if (what == 1 || what == 2) return errno = number, -1;        \
        if (what == 3) DIE();                                         \
        return 0;                                                     \
    }
/* posix_fallocate returns its error. */
#define ALLOCATE(name, offset)                                        \
    int name(int fd, offset start, offset length) {                   \
        static __typeof__(&name) real;                                \
        if (!real) real = REAL(name);                                 \
        int what = atomic_load(&armed) ? hit("fallocate", of_store(fd)) : 0; \
        if (what == 1) return number;                                 \
        if (what == 2) return real(fd, start, length / 2), number;    \
        int got = real(fd, start, length);                            \
        if (what == 3) DIE();                                         \
        return got;                                                   \
    }
#define OPEN(name)                                                    \
    int name(const char *path, int flags, ...) {                      \
        static int (*real)(const char *, int, ...);                   \
        if (!real) real = (int (*)(const char *, int, ...))dlsym(RTLD_NEXT, #name); \
        va_list more;                                                 \
        va_start(more, flags);                                        \
        int mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, int) : 0; \
        va_end(more);                                                 \
        int what = atomic_load(&armed) ? hit("open", below(path)) : 0; \
        if (what == 1 || what == 2) return errno = number, -1;        \
        int got = real(path, flags, mode);                            \
        if (what == 3) DIE();                                         \
        return got;                                                   \
    }
#define OPENAT(name)                                                  \
    int name(int directory, const char *path, int flags, ...) {       \
        static int (*real)(int, const char *, int, ...);              \
        if (!real) real = (int (*)(int, const char *, int, ...))dlsym(RTLD_NEXT, #name); \
        va_list more;                                                 \
        va_start(more, flags);                                        \
        int mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, int) : 0; \
        va_end(more);                                                 \
        int what = atomic_load(&armed) ? hit("open", at_path(directory, path)) : 0; \
        if (what == 1 || what == 2) return errno = number, -1;        \
        int got = real(directory, path, flags, mode);                 \
        if (what == 3) DIE();                                         \
        return got;                                                   \
    }

PARTIAL(write, "write", , (int fd, const void *data, size_t n), (fd, data, n))
PARTIAL(pwrite, "write", , (int fd, const void *data, size_t n, off_t offset), (fd, data, n, offset))
PARTIAL(pwrite64, "write", , (int fd, const void *data, size_t n, off64_t offset), (fd, data, n, offset))
PARTIAL(read, "read", , (int fd, void *data, size_t n), (fd, data, n))
PARTIAL(pread, "read", , (int fd, void *data, size_t n, off_t offset), (fd, data, n, offset))
PARTIAL(pread64, "read", , (int fd, void *data, size_t n, off64_t offset), (fd, data, n, offset))
VECTOR(writev, "write", (int fd, const struct iovec *v, int n), (fd, v, n))
VECTOR(pwritev, "write", (int fd, const struct iovec *v, int n, off_t offset), (fd, v, n, offset))
VECTOR(pwritev64, "write", (int fd, const struct iovec *v, int n, off64_t offset), (fd, v, n, offset))
VECTOR(preadv, "read", (int fd, const struct iovec *v, int n, off_t offset), (fd, v, n, offset))
VECTOR(preadv64, "read", (int fd, const struct iovec *v, int n, off64_t offset), (fd, v, n, offset))
VECTOR(pwritev2, "write", (int fd, const struct iovec *v, int n, off_t offset, int flags), (fd, v, n, offset, flags))
VECTOR(pwritev64v2, "write", (int fd, const struct iovec *v, int n, off64_t offset, int flags), (fd, v, n, offset, flags))
VECTOR(preadv2, "read", (int fd, const struct iovec *v, int n, off_t offset, int flags), (fd, v, n, offset, flags))
VECTOR(preadv64v2, "read", (int fd, const struct iovec *v, int n, off64_t offset, int flags), (fd, v, n, offset, flags))
FLUSH(fsync)
FLUSH(fdatasync)
FLUSH(syncfs)
ALLOCATE(posix_fallocate, off_t)
ALLOCATE(posix_fallocate64, off64_t)
OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)
WHOLE(int, fallocate, "fallocate", of_store(fd), (int fd, int mode, off_t a, off_t b), (fd, mode, a, b))
WHOLE(int, fallocate64, "fallocate", of_store(fd), (int fd, int mode, off64_t a, off64_t b), (fd, mode, a, b))
WHOLE(int, ftruncate, "truncate", of_store(fd), (int fd, off_t n), (fd, n))
WHOLE(int, ftruncate64, "truncate", of_store(fd), (int fd, off64_t n), (fd, n))
WHOLE(int, truncate, "truncate", below(path), (const char *path, off_t n), (path, n))
WHOLE(int, truncate64, "truncate", below(path), (const char *path, off64_t n), (path, n))
WHOLE(int, rename, "rename", below(old), (const char *old, const char *new), (old, new))
WHOLE(int, renameat, "rename", at_path(a, old), (int a, const char *old, int b, const char *new), (a, old, b, new))
WHOLE(int, unlink, "unlink", below(path), (const char *path), (path))
WHOLE(int, unlinkat, "unlink", at_path(at_, path), (int at_, const char *path, int flags), (at_, path, flags))
WHOLE(int, rmdir, "unlink", below(path), (const char *path), (path))
WHOLE(int, mkdir, "mkdir", below(path), (const char *path, mode_t mode), (path, mode))
WHOLE(int, mkdirat, "mkdir", at_path(at_, path), (int at_, const char *path, mode_t mode), (at_, path, mode))
WHOLE(int, msync, "msync", 1, (void *address, size_t n, int flags), (address, n, flags))
/* Of madvise, what allocates and what enters pages can be told apart. */
int madvise(void *address, size_t n, int advice) {
    static __typeof__(&madvise) real;
    if (!real) real = REAL(madvise);
    const char *finer = advice == 25 ? "collapse" : advice == 22 || advice == 23 ? "populate" : "advise";
    int what = atomic_load(&armed) ? hit("madvise", n > 0) + hit(finer, n > 0) : 0;
    if (what == 1 || what == 2) return errno = number, -1;
    int got = real(address, n, advice);
    if (what == 3) DIE();
    return got;
}
WHOLE(void *, mmap, "mmap", fd < 0 ? !by_interpreter(__builtin_return_address(0)) : of_store(fd), (void *a, size_t n, int p, int f, int fd, off_t o), (a, n, p, f, fd, o))
WHOLE(void *, mmap64, "mmap", fd < 0 ? !by_interpreter(__builtin_return_address(0)) : of_store(fd), (void *a, size_t n, int p, int f, int fd, off64_t o), (a, n, p, f, fd, o))

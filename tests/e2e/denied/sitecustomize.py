"""For a supervisor, and all that it starts, that may not do something: Python runs this first where it is on the path.

PERDURE_TEST_DENIED says what: `userfaultfd`, as the profiles of containers have it, is refused with EPERM by either
way; `pagemap_scan` is not known, as in a kernel before Linux 6.7. A seccomp filter (x86-64), which every child inherits
and nobody can take off.
"""

import ctypes
import errno
import os
import struct

_USERFAULTFD, _IOCTL = 323, 16
_USERFAULTFD_IOC_NEW, _PAGEMAP_SCAN = 0xAA00, 0xC0606610
_DENIED = {
    "userfaultfd": [(_USERFAULTFD, None, errno.EPERM), (_IOCTL, _USERFAULTFD_IOC_NEW, errno.EPERM)],
    "pagemap_scan": [(_IOCTL, _PAGEMAP_SCAN, errno.ENOTTY)],
}
_LOAD, _EQUAL, _RETURN = 0x20, 0x15, 0x06
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_NUMBER, _SECOND_ARGUMENT = 0, 24  # in struct seccomp_data
_PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS, _FILTER = 22, 38, 2


def _program(rules):
    """Instructions (code, jump if true, jump if false, operand) of classic BPF. Source: seccomp(2)."""
    for number, argument, error in rules:
        yield (_LOAD, 0, 0, _NUMBER)
        yield (_EQUAL, 0, 1 if argument is None else 3, number)
        if argument is not None:
            yield (_LOAD, 0, 0, _SECOND_ARGUMENT)
            yield (_EQUAL, 0, 1, argument)
        yield (_RETURN, 0, 0, _ERRNO | error)
    yield (_RETURN, 0, 0, _ALLOW)


_program_bytes = [struct.pack("<HBBI", *each) for each in _program(_DENIED[os.environ["PERDURE_TEST_DENIED"]])]
_buffer = ctypes.create_string_buffer(b"".join(_program_bytes))
_filter = struct.pack("<HxxxxxxQ", len(_program_bytes), ctypes.addressof(_buffer))
_libc = ctypes.CDLL(None, use_errno=True)
for _words in ((_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), (_PR_SET_SECCOMP, _FILTER, _filter, 0, 0)):
    if _libc.prctl(*_words):
        raise OSError(ctypes.get_errno(), "seccomp")

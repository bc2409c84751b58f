"""C tests of the library without Python in the process; see ../test_capi.c."""

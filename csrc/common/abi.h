// What the loader asks a shared object before it calls anything.
#pragma once

#include <cstdint>

#define XOPD_EXPORT __attribute__((visibility("default")))

// Raised with every change of a struct or of an entry point; the loader refuses any other number.
#define XOPD_ABI_VERSION 7

// What an entry point returns besides 0 and the errors of the parallel loop, which are > 0.
#define XOPD_ROW_OUT_OF_RANGE (-1)
#define XOPD_NO_MATMUL (-2)
#define XOPD_ENTRY_OUT_OF_RANGE (-3)  // a class, count, offset or row of a list

#pragma once

/// MATE's version, the one place that states it: the build and the Python packages read it here.
#define MATE_VERSION "0.1.0"

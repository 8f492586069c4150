#pragma once

/// The bytes of a file (a fatbin; a string literal, as baton_fatbin() defines it) in this object file, behind the symbol
/// `symbol`, which no other library sees. At file scope, once for each symbol of the program.
#define BATON_EMBED(symbol, path)       \
  asm(".pushsection .rodata, \"a\", @progbits\n" \
      ".balign 64\n"                    \
      ".hidden " #symbol "\n"           \
      ".global " #symbol "\n"           \
      #symbol ":\n"                     \
      ".incbin \"" path "\"\n"          \
      ".balign 64\n"                    \
      ".popsection\n");                 \
  extern "C" const char symbol[]

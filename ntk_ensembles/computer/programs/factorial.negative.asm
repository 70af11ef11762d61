# The factorial. It fits the word up to n = 5 with 8 bits, up to 7 with 16.
#
# input n: 0 to max
# result f: 1 * 2 * ... * n, wrapped to the word

loop:   n left                  # left <- -n, as left is 0 here
        one n down:-1           # n <- n - 1; it was 0: halt; this -1 is the constant down
        minus                   # minus <- 0
add:    f minus                 # minus <- minus - f
        down left add           # as often as n said before
        f
        minus f                 # f <- n f
        zero down loop

n:      . 5
f:      . 1
left:   . 0
minus:  . 0
one:    . 1
zero:   . 0

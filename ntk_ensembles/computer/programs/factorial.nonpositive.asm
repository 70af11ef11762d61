# The factorial. It fits the word up to n = 5 with 8 bits, up to 7 with 16.
#
# input n: 0 to max
# result f: 1 * 2 * ... * n, wrapped to the word

loop:   one n -1                # n <- n - 1; at most 0: halt
        left
        n left                  # left <- -n
add:    f minus                 # minus <- minus - f
        down left add           # as often as n said before
        f
        minus f                 # f <- n f
        minus minus loop        # minus <- 0: always goes to loop

n:      . 5
f:      . 1
left:   . 0
minus:  . 0
one:    . 1
down:   . -1

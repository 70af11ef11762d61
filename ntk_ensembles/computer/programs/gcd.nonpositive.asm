# The greatest common divisor, by repeated subtraction.
#
# input x: 1 to max
# input y: 1 to max
# result gcd: the greatest common divisor of x and y; it replaces x

loop:   y x at_most             # x <- x - y; at most 0: x was not larger
        zero zero loop
at_most: minus
        y minus                 # minus <- -y
        minus x                 # x <- x + y
        x y -1                  # y <- y - x; 0: they were equal, halt
        zero zero loop

x: gcd: . 91
y:      . 35
minus:  . 0
zero:   . 0
